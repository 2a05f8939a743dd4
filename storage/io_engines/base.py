"""What a read engine is."""

from typing import Protocol


class ReadEngine(Protocol):
    """Reads whole units of files into host memory, from several threads at once.

    Attributes:
        name: as the report prints it.
        unit_bytes: file offsets, sizes and memory addresses must be multiples of this.
        fallbacks: what is slower than it could be, and why; a sentence each.
    """

    name: str
    unit_bytes: int
    fallbacks: list[str]

    def open(self, path: str, own: bool = False) -> None:
        """Open `path` for the reads to come; opening it again changes nothing.

        Args:
            own: this process writes the file, so that it may change.
        """

    def read(self, path: str, file_offset: int, memory: memoryview, needed_bytes: int) -> None:
        """Fill `memory` from `file_offset`; only the end of the file may cut it short, and not below `needed_bytes`.

        Raises:
            ReadError: if the system refuses, or the file ends before `needed_bytes`.
        """

    def read_unaligned(self, path: str, file_offset: int, memory: memoryview) -> None:
        """Fill `memory` from any offset, through the page cache: for a few bytes here and there.

        Raises:
            ReadError: as `read` does.
        """

    def check_unchanged(self) -> None:
        """Raise CheckpointChanged if an opened file is not what it was when it was opened."""

    def forget(self, path: str) -> None:
        """Close one file, if it is open; no read of it may be under way."""

    def close(self) -> None:
        """Close every file."""
