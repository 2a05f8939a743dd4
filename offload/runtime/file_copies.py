"""Copies in memory of weights that files hold: which of them were written to, by views whose writes torch does not count."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from offload.model.homes import ParameterHome
from offload.storage.digest import digest


@dataclass(frozen=True, slots=True)
class _Known:
    home: ParameterHome
    digest: bytes


class FileCopies:
    """What resident weights were when they came."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def add(self, homes: Sequence[ParameterHome], digests: Sequence[bytes]) -> None:
        """Remember what came for these homes."""
        for home, found in zip(homes, digests, strict=True):
            if home.original is not None and home.original.nbytes:
                self._known[id(home)] = _Known(home, found)

    def mark(self, homes: Iterable[ParameterHome] | None = None) -> None:
        """Mark which of these (by default of all) were written to; their homes have what was written, and are asked no more."""
        known = (
            list(self._known.values())
            if homes is None
            else [self._known[id(home)] for home in homes if id(home) in self._known]
        )
        for item in known:
            del self._known[id(item.home)]
            if _differs(item):
                item.home.modified = True
                item.home.keep(item.home.parameter.data)

    def edited(self) -> str | None:
        """The name of a weight that was written to; None if none was. All of them are read."""
        return next((item.home.name for item in self._known.values() if _differs(item)), None)


def _differs(item: _Known) -> bool:
    home, values = item.home, item.home.parameter.data
    if home.modified or home.trained or values.data_ptr() == home.tensor.data_ptr() or values.shape != home.tensor.shape:
        return False
    return digest(values) != item.digest
