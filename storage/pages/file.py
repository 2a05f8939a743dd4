"""Pages on disk: a file without a name, of as many pages as were ever needed at once."""

import tempfile
import threading

from offload.storage.state_file import StateFile

_GROWTH_BYTES = 16 << 20


class PageFile:
    """A file of pages of one size, with a free list. It vanishes with the process.

    Args:
        folder: where; None for the folder of temporary files.
        page_bytes: a multiple of 4 KiB.

    Raises:
        DiskFolderError: if nothing can be written there.
    """

    def __init__(self, folder: str | None, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._free: list[int] = []
        self._pages = 0
        self._lock = threading.Lock()
        self._file = StateFile.new(folder or tempfile.gettempdir())

    @property
    def nbytes(self) -> int:
        """What it takes of the disk."""
        return self._file.nbytes

    @property
    def direct(self) -> bool:
        """False where the filesystem refuses O_DIRECT."""
        return self._file.direct

    def take(self) -> int:
        """A page's place, with room for it set aside.

        Raises:
            DiskFull: if there is none.
        """
        with self._lock:
            if not self._free:
                more = max(1, min(_GROWTH_BYTES // self._page_bytes, max(8, self._pages)))
                self._file.reserve((self._pages + more) * self._page_bytes)
                self._free = list(range(self._pages + more - 1, self._pages - 1, -1))
                self._pages += more
            return self._free.pop()

    def give(self, place: int) -> None:
        with self._lock:
            self._free.append(place)

    def write(self, place: int, memory: memoryview) -> None:
        """Raises DiskFull or DiskFolderError."""
        self._file.write(place * self._page_bytes, memory)

    def read(self, place: int, memory: memoryview) -> None:
        """Raises ReadError."""
        self._file.read(place * self._page_bytes, memory)

    def close(self) -> None:
        self._file.close()
