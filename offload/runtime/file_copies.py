"""Copies in memory of weights that files hold: which of them were written to, by views whose writes torch does not count."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import torch

from offload.model.homes import ParameterHome

_ROW_WORDS = 1024


def digest(values: torch.Tensor) -> bytes:
    """A hash of the sums of an array's words, along its rows and along its columns: as fast as memory is read, nearly.

    An edit changes a sum, and one that only moves numbers changes their order.
    """
    content = values.detach().contiguous().view(-1).view(torch.uint8)
    whole = 0 if content.data_ptr() % 8 else len(content) // (8 * _ROW_WORDS) * 8 * _ROW_WORDS
    rows = content[:whole].view(torch.int64).view(-1, _ROW_WORDS)
    found = hashlib.blake2b(digest_size=16)
    for part in (_sum(rows, 1), _sum(rows, 0), content[whole:].cpu().numpy()):
        found.update(part.tobytes())
    return found.digest()


def _sum(rows: torch.Tensor, axis: int) -> numpy.ndarray:
    """On the device that has them; on the CPU in the calling thread alone, for which torch would start further ones."""
    sums: numpy.ndarray = numpy.add.reduce(rows.numpy(), axis) if rows.device.type == "cpu" else rows.sum(axis).cpu().numpy()
    return sums


@dataclass(frozen=True, slots=True)
class _Known:
    home: ParameterHome
    digest: bytes


class FileCopies:
    """What resident weights were when they came."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def add(self, home: ParameterHome, values: torch.Tensor) -> None:
        """Remember the values that came for a home; from any thread, before they can be written to."""
        if home.original is not None and values.nbytes and values.data_ptr() != home.original.data_ptr():
            self._known[id(home)] = _Known(home, digest(values))

    def mark(self, homes: Iterable[ParameterHome] | None = None) -> None:
        """Mark which of these (by default of all) were written to; their homes have what was written, and are asked no more."""
        known = (
            list(self._known.values())
            if homes is None
            else [self._known[id(home)] for home in homes if id(home) in self._known]
        )
        for item in known:
            del self._known[id(item.home)]
            home, values = item.home, item.home.parameter.data
            if home.modified or home.trained or values.data_ptr() == home.tensor.data_ptr():
                continue
            if values.shape != home.tensor.shape or digest(values) == item.digest:
                continue
            home.modified = True
            with torch.no_grad():
                home.tensor.copy_(values)
