"""Pages of lower tiers, brought ahead of their use."""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import groupby, islice

from offload.storage.pages.pool import Page, PageFetch


class PagePrefetcher:
    """Brings pages of lower tiers ahead of their use.

    Args:
        ring_pages: that may be on their way, or there, at once.
    """

    def __init__(self, ring_pages: int) -> None:
        self._ring_pages = ring_pages
        self.batch_pages = max(1, ring_pages // 4)
        """What is brought at once, since that saves submissions."""
        self._fetches: OrderedDict[Page, PageFetch] = OrderedDict()
        self._as_foreseen = False
        """What was read last was on its way."""

    def take(self, page: Page, in_use: int = 0) -> PageFetch:
        """The page on its way; whoever takes it releases it.

        Args:
            in_use: pages of the ring that were taken and not released.
        """
        fetch = self._fetches.pop(page, None)
        self._as_foreseen = fetch is not None
        if fetch is None:
            if len(self._fetches) + in_use >= self._ring_pages:
                # Something else is read than was foreseen.
                self.forget()
            (fetch,) = page.pool.fetch([page])
        return fetch

    def has(self, page: Page) -> bool:
        return page in self._fetches

    def ahead(self, pages: Iterator[Page], in_use: int = 0) -> None:
        """Start bringing what comes next, as far as there is room: a few at once, which costs fewer submissions."""
        room = self._ring_pages - in_use
        if self._as_foreseen and len(self._fetches) > 0 and room - len(self._fetches) < self.batch_pages:
            return
        wanted = list(dict.fromkeys(islice(pages, room)))
        if len(self._fetches) + sum(page not in self._fetches for page in wanted) > room:
            for page in [page for page in self._fetches if page not in wanted]:
                self._fetches.pop(page).cancel()
        missing = [page for page in wanted if page not in self._fetches][: max(0, room - len(self._fetches))]
        for pool, pages in groupby(missing, key=lambda page: page.pool):
            together = list(islice(pages, pool.slots.free))
            if together:
                self._fetches.update(zip(together, pool.fetch(together), strict=True))

    def drop(self, page: Page) -> None:
        if (fetch := self._fetches.pop(page, None)) is not None:
            fetch.cancel()

    def forget(self) -> None:
        while self._fetches:
            self._fetches.popitem()[1].cancel()
