"""The pages of all KV caches of a session: taken, sealed, moved down, and brought in the order in which they are read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from offload.kv.buffer_cache import BufferCache
from offload.kv.kv_block import KvBlock
from offload.kv.page_layout import KeyValue, PageLayout
from offload.kv.prefetch import PagePrefetcher
from offload.kv.quantization import PageQuantizer
from offload.kv.reading import Reading
from offload.scheduler.kv_pages import PageResidency, coming
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, Tier, align_up
from offload.storage.errors import ConfigError, gib
from offload.storage.pages.pool import Page, PageFetch, PagePool


class Filler(Protocol):
    """Who fills a page.

    Attributes:
        order: stands for the cache.
    """

    order: Any

    def close(self) -> None:
        """Nothing is added to the open page any more."""


class KvStore:
    """Where pages live.

    Args:
        raw: the pages that are filled, and that stay as they are.
        ring_pages: for pages that are read from lower tiers.
        resident_pages: full ones that may stay on the device.
        codec: of full pages; None to keep them as they are.
        coded_pool: makes the pool of the coded pages, given the bytes of one.
        beside: pages in CPU memory are read there, by the CPU.
        tell: told a sentence of what is otherwise than planned.
        page_tokens: the most tokens of each sequence in one page; None for as many as it has room for.
    """

    def __init__(
        self,
        raw: PagePool,
        ring_pages: int,
        resident_pages: int,
        codec: PageQuantizer | None = None,
        coded_pool: Callable[[int], tuple[PagePool, int, int]] | None = None,
        cpu_attends: bool = False,
        warn: Callable[[str], None] = lambda sentence: None,
        page_tokens: int | None = None,
    ) -> None:
        self.raw = raw
        self._page_tokens = page_tokens
        self.cpu_attends = cpu_attends
        self.warn = warn
        self.is_open = True
        self.kept_raw = 0
        """Pages that no code was good enough for."""
        self.sealed = 0
        self.pools = [raw]
        self.whole = BufferCache()
        """Memory for layers that are assembled."""
        self.peak_bytes: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._stream = PagePrefetcher(ring_pages)
        self._residency: dict[PagePool, PageResidency[Page]] = {raw: PageResidency(resident_pages)}
        self._codec = codec
        self._coded_pool = coded_pool
        self._bytes: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._left_last: WeakKeyDictionary[Any, Page] = WeakKeyDictionary()
        """The page of each layer that went down last."""
        self._filling: dict[Filler, None] = {}
        """Layers that fill a page, by when they began it."""

    def page_shape(self, like: PageLayout) -> PageLayout:
        """As many tokens like these as a page takes."""
        shape = like.fit_to(self.raw.page_bytes)
        if not shape.tokens:
            raise ConfigError(
                f"one token of {like.rows} sequences takes {gib(like.token_bytes)} of a layer's KV cache, and a page has "
                f"{gib(self.raw.page_bytes)}: enter with the batch_size that is used, or give the KV cache more memory"
            )
        return shape if self._page_tokens is None else replace(shape, tokens=min(shape.tokens, self._page_tokens))

    def open(self, layer: "Filler", shape: PageLayout, start: int) -> KvBlock:
        """A page to be filled by a layer."""
        self._filling.pop(layer, None)
        page = self._page(self.raw, layer)
        self._filling[layer] = None
        return KvBlock(page, shape, start)

    def seal(self, layer: "Filler", block: KvBlock) -> None:
        """A page is full, or nothing is added to it any more: it is coded, and may go down a tier."""
        self._filling.pop(layer, None)
        self.sealed += 1
        page = block.page
        if self._codec is not None and block.tokens == block.shape.tokens and self._encode(layer, block):
            page.users -= 1
            self._free(page)
        else:
            page.users -= 1
            self._stays(layer, page)

    def pair(self, block: KvBlock) -> KeyValue:
        """The tensors of a page that is being filled."""
        return block.shape.views(self.raw.tensor(block.page))

    def read(
        self, block: KvBlock, upcoming: Callable[[], Iterator[Page]] | None = None, held: Sequence[Reading] = ()
    ) -> Reading:
        """Begin to read a block, wherever it is.

        Args:
            upcoming: pages that will be read after this one, of lower tiers; None where that is not known.
            held: what is being read at the same time.
        """
        page = block.page
        if page.tier is Tier.DEVICE:
            return self._reading(block, page.pool.tensor(page))
        if self.cpu_attends and page.tier is Tier.CPU and not block.coded:
            return self._reading(block, page.pool.tensor(page))
        if not self._stream.has(page):
            self._make_room(page.pool, None)
        in_use = sum(reading.is_lent for reading in held)
        fetch = self._stream.take(page, in_use)
        if upcoming is not None:
            self._stream.ahead(upcoming(), in_use + 1)
        return self._reading(block, fetch.wait(), fetch)

    def _reading(self, block: KvBlock, memory: torch.Tensor, fetch: PageFetch | None = None) -> Reading:
        pair = partial(self.decode, memory, block.shape) if block.coded else partial(block.shape.views, memory)
        return Reading(block, pair, fetch)

    @property
    def pages_at_once(self) -> int:
        """As many of the ring's pages as may be read together."""
        return self._stream.batch_pages

    def done(self, readings: Sequence[Reading]) -> None:
        """The compute that reads them was submitted."""
        lent = [reading for reading in readings if reading.is_lent]
        after = self.raw.device.record() if lent else None
        for reading in lent:
            reading.done(after)

    def ahead(self, pages: Iterator[Page]) -> None:
        self._stream.ahead(pages)

    def comes(self, block: KvBlock) -> bool:
        """True if reading it takes a link."""
        if block.page.tier is Tier.DEVICE:
            return False
        return not (self.cpu_attends and block.page.tier is Tier.CPU and not block.coded)

    def coming(self, layers: Sequence[Sequence[KvBlock]], layer: int, done: int) -> Iterator[Page]:
        """The pages that will be read next, of lower tiers."""
        # Only as far as somebody asks: there may be thousands.
        return (block.page for block in coming(layers, layer, done) if self.comes(block))

    def decode(self, memory: torch.Tensor, shape: PageLayout) -> KeyValue:
        assert self._codec is not None
        return self._codec.decode(memory, shape)

    def share(self, block: KvBlock) -> KvBlock:
        """Another holder of the same page."""
        page = block.page.pool.share(block.page)
        return KvBlock(page, block.shape, block.start, block.tokens, block.rows, block.coded)

    def release(self, layer: "Filler", block: KvBlock, filling: bool) -> None:
        """A holder less. Args: filling: it is the page that the layer fills."""
        if filling:
            self._filling.pop(layer, None)
            block.page.users -= 1
        page = block.page
        if page.references == 1:
            self._stream.drop(page)
            self._residency[page.pool].remove(page)
            self._free(page)
        else:
            page.pool.drop(page)

    def keep_bytes(self, owner: "Filler", content: torch.Tensor) -> Page:
        """A page with these bytes, uint8 [at most page_bytes] on the device: on whatever tier."""
        page = self._page(self.raw, owner)
        self.raw.tensor(page)[: content.numel()].copy_(content)
        page.users -= 1
        self._stays(owner, page)
        return page

    def give_back(self, page: Page, wanted: bool = True) -> torch.Tensor:
        """The bytes of such a page, uint8 [page_bytes] in memory of their own, where `wanted`; the page is free then."""
        content = torch.empty(0, dtype=torch.uint8)
        if wanted and page.tier is Tier.DEVICE:
            content = self.raw.tensor(page).clone()
        elif wanted:
            if not self._stream.has(page):
                self._make_room(page.pool, None)
            fetch = self._stream.take(page)
            content = fetch.wait().clone()
            fetch.release()
        self._residency[page.pool].remove(page)
        self._free(page)
        return content

    def coded_bytes(self, shape: PageLayout) -> int:
        assert self._codec is not None
        return align_up(self._codec.nbytes(shape), BLOCK_ALIGNMENT_BYTES)

    def close(self) -> None:
        self.is_open = False
        self.whole.forget()
        self._stream.forget()
        for pool in self.pools:
            pool.close()

    def _page(self, pool: PagePool, layer: "Filler") -> Page:
        self._make_room(pool, layer.order)
        page = pool.allocate()
        self._count(Tier.DEVICE, pool.page_bytes)
        return page

    def _make_room(self, pool: PagePool, order: object) -> None:
        """More caches are in use than were reserved for: what was brought ahead is in the way, what stays, or what others fill.

        Args:
            order: stands for the cache that needs a page.
        """
        if not pool.has_room:
            self._stream.forget()
        while not pool.has_room:
            leaving = self._residency[pool].next_to_go(anyway=True)
            if leaving is not None:
                self._demote(*leaving)
                continue
            other = next((layer for layer in self._filling if layer.order is not order), None)
            if other is None or pool is not self.raw:
                return
            other.close()

    def _stays(self, layer: object, page: Page) -> None:
        self._residency[page.pool].add(layer, page)
        while (leaving := self._residency[page.pool].next_to_go()) is not None:
            self._demote(*leaving)

    def _demote(self, layer: object, page: Page) -> None:
        last = self._left_last.get(layer)
        page.pool.demote(page, last if last is not None and last.pool is page.pool else None)
        self._left_last[layer] = page
        self._count(Tier.DEVICE, -page.pool.page_bytes)
        self._count(page.tier, page.pool.page_bytes)

    def _free(self, page: Page) -> None:
        self._count(page.tier, -page.pool.page_bytes)
        page.pool.drop(page)

    def _count(self, tier: Tier, nbytes: int) -> None:
        self._bytes[tier] += nbytes
        self.peak_bytes[tier] = max(self.peak_bytes[tier], self._bytes[tier])

    def _encode(self, layer: "Filler", block: KvBlock) -> bool:
        """Replace a full page by its code."""
        assert self._codec is not None
        nbytes = self.coded_bytes(block.shape)
        pool = next((pool for pool in self.pools[1:] if pool.page_bytes == nbytes), None)
        if pool is None:
            assert self._coded_pool is not None
            pool, ring_pages, resident_pages = self._coded_pool(nbytes)
            self._stream.forget()
            self._stream = PagePrefetcher(ring_pages)
            self.pools.append(pool)
            self._residency[pool] = PageResidency(resident_pages)
        page = self._page(pool, layer)
        if not self._codec.encode(self.pair(block), block.shape, pool.tensor(page)):
            page.users -= 1
            self._free(page)
            self.kept_raw += 1
            return False
        page.users -= 1
        self._stays(layer, page)
        block.page, block.coded = page, True
        return True
