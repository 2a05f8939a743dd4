"""Edits of weights through views whose writes torch does not count: `.data`, NumPy."""

from collections.abc import Iterable, Iterator

import torch

from offload.model.homes import ParameterHome
from offload.storage.written_pages import PAGE_BYTES, Range, private_file_ranges, written


class UnseenEdits:
    """Finds weights that live on a file's mapping and were written to there: the file has other values than they.

    The mappings are private, so that what was written lies in pages of the process's own.
    """

    def __init__(self) -> None:
        self._addresses: list[int] | None = None
        """The addresses of what is watched; None if that is to be looked up anew."""
        self._homes: list[tuple[Range, ParameterHome]] = []
        self._joined: list[Range] = []

    def mark(self, homes: Iterable[ParameterHome]) -> bool:
        """Mark what was edited since the last pass; from now on it is taken from memory. False if the system cannot tell."""
        homes = [home for home in homes if not home.modified and not home.trained]
        # Not by identity: a tensor that came instead of another may have its id.
        addresses = [home.tensor.data_ptr() for home in homes]
        if addresses != self._addresses:
            self._watch(homes)
            self._addresses = addresses
        found = written(self._joined)
        if found is None:
            return False
        if any(found):
            # Which ones: as rare as edits are.
            pages = written([where for where, _ in self._homes]) or []
            for (_, home), edited in zip(self._homes, pages, strict=True):
                if edited:
                    _take_over(home)
        return True

    def look_anew(self) -> None:
        """Some weights have copies since that compute: their homes are asked otherwise."""
        self._addresses = None

    def _watch(self, homes: list[ParameterHome]) -> None:
        mapped = sorted(private_file_ranges())
        in_files = sorted(((_range_of(home), home) for home in homes), key=lambda item: item[0])
        self._homes = [(_watched(home, where), home) for where, home in in_files if _inside(where, mapped)]
        self._homes = [(where, home) for where, home in self._homes if where[0] < where[1]]
        self._joined = list(_joined(where for where, _ in self._homes))


def _take_over(home: ParameterHome) -> None:
    home.modified = True
    if home.parameter.data_ptr() != home.tensor.data_ptr():
        # It is resident: what computes is a copy.
        with torch.no_grad():
            home.parameter.data.copy_(home.tensor)


def _range_of(home: ParameterHome) -> Range:
    begin = home.tensor.data_ptr() if home.tensor.device.type == "cpu" else 0
    return begin, begin + home.tensor.nbytes


def _watched(home: ParameterHome, where: Range) -> Range:
    """Leave out of a resident one, whose copy may have been written to, what it shares with a neighbour."""
    if home.parameter.data_ptr() == home.tensor.data_ptr():
        return where
    return -(-where[0] // PAGE_BYTES) * PAGE_BYTES, where[1] // PAGE_BYTES * PAGE_BYTES


def _inside(where: Range, mapped: list[Range]) -> bool:
    return any(begin <= where[0] and where[1] <= end for begin, end in mapped)


def _joined(ranges: Iterable[Range]) -> Iterator[Range]:
    """Neighbours as one: a question each costs more than the pages in it."""
    last: Range | None = None
    for begin, end in ranges:
        if last is not None and begin - last[1] <= PAGE_BYTES:
            last = last[0], max(end, last[1])
            continue
        if last is not None:
            yield last
        last = begin, end
    if last is not None:
        yield last
