"""Pages of lower tiers, brought ahead of their use."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice

from offload.storage.pages.pool import Landing, Page


class PageStream:
    """Brings pages of lower tiers ahead of their use.

    Args:
        ring_pages: that may be on their way, or there, at once.
    """

    def __init__(self, ring_pages: int) -> None:
        self._ring_pages = ring_pages
        self._landed: OrderedDict[Page, Landing] = OrderedDict()

    def take(self, page: Page) -> Landing:
        """The page on its way; whoever takes it releases it."""
        landing = self._landed.pop(page, None)
        if landing is None:
            if len(self._landed) >= self._ring_pages:
                # Something else is read than was foreseen.
                self.forget()
            landing = page.pool.fetch(page)
        return landing

    def has(self, page: Page) -> bool:
        return page in self._landed

    def ahead(self, pages: Iterator[Page], in_use: int = 0) -> None:
        """Start bringing what comes next, as far as there is room."""
        room = self._ring_pages - in_use
        wanted = list(dict.fromkeys(islice(pages, room)))
        if len(self._landed) + sum(page not in self._landed for page in wanted) > room:
            for page in [page for page in self._landed if page not in wanted]:
                self._landed.pop(page).cancel()
        for page in wanted:
            if page not in self._landed and len(self._landed) < room and page.pool.slots.free:
                self._landed[page] = page.pool.fetch(page)

    def drop(self, page: Page) -> None:
        if (landing := self._landed.pop(page, None)) is not None:
            landing.cancel()

    def forget(self) -> None:
        while self._landed:
            self._landed.popitem()[1].cancel()
