"""How a KV cache is cut into pages, and which of them go down a tier. Pure."""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from offload.scheduler.hardware import HardwareProfile
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.errors import BudgetTooSmall, gib

Item = TypeVar("Item")
Page = TypeVar("Page", bound=Hashable)

_LARGEST_PAGE_BYTES = 2 << 20
"""Larger ones move no faster, and each layer holds one that is being filled."""

_OPEN_SHARE = 3
"""Pages that are being filled take at most this part of the memory, where pages can be small enough."""

_RING_SHARE = 3
"""The largest part of what is left for pages that are onloaded to be read (one in so many); the rest stays."""

_RING_BYTES = 32 << 20
"""And no more than keeps a link busy while a layer computes, which is milliseconds."""

_SPARE_BYTES = 64 << 10

_ROOM_TO_STAY = 1.5
"""Times what all takes, so that all stays: pages that are being filled are half empty."""

CPU_ATTENTION_SHARE = 0.5
"""The share of the measured memory bandwidth that torch's attention reaches on a CPU (one query, bf16), about."""

_LEAST_RING = 2
"""One is read while the next one comes."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """What grows with every token.

    Attributes:
        layers: that keep keys and values of every token.
        token_bytes: keys and values of one token of one sequence in one of them.
    """

    layers: int
    token_bytes: int

    @property
    def all_token_bytes(self) -> int:
        return self.layers * self.token_bytes


@dataclass(frozen=True, slots=True)
class PagedKv:
    """A way to keep keys and values in pages.

    Attributes:
        memory_bytes: of the device, for pages and for a layer that is put together.
        segments: attention reads page after page: of level *rounding*; else a layer is put together for the stock kernel.
        stored_percent: of what a token takes in the model's dtype, what it takes in a full page.
        shelves: the state of layers that do not keep all tokens is in pages too, but for two layers at a time.
    """

    memory_bytes: int
    segments: bool = False
    stored_percent: int = 100
    state_offload: bool = False


@dataclass(frozen=True, slots=True)
class KvDemand:
    """What is asked of a plan for keys and values.

    Attributes:
        ways: to keep them in pages, the best first; none where all of them stay on the device.
        required: the first way is to be taken even where all of them would fit.
    """

    ways: tuple[PagedKv, ...] = ()
    required: bool = False


@dataclass(frozen=True, slots=True)
class KvPages:
    """How the device's part of a KV cache is used.

    Attributes:
        page_bytes: of one page: some tokens of one layer, of all sequences.
        device_pages: how many the device has room for.
        ring_pages: of those, how many are for pages that are brought to be read; one a layer is being filled.
        assembled_bytes: beside the pages, one layer's keys and values in one piece, as the stock kernel reads them, or what a
            policy chooses by; 0 where attention reads page after page.
    """

    page_bytes: int
    device_pages: int
    ring_pages: int
    assembled_bytes: int

    @property
    def nbytes(self) -> int:
        return self.page_bytes * self.device_pages + self.assembled_bytes

    def resident_pages(self, layers: int) -> int:
        """Those that may stay, of all layers together."""
        return self.device_pages - self.ring_pages - layers


def cut(
    shape: KvShape,
    batch_size: int,
    total_tokens: int,
    kv_bytes: int,
    segments: bool,
    page_tokens: int | None = None,
    index_share: float = 0.0,
    stored_percent: int = 100,
) -> KvPages:
    """Divide `kv_bytes` of device memory among pages that are filled, that stay, and that come and go.

    Args:
        total_tokens: of one sequence, at the end.
        segments: attention reads page after page; else a layer is put together first.
        page_tokens: of each sequence in one page; None for what suits the memory.
        index_share: of all bytes, what a policy keeps besides to choose by.
        stored_percent: of a full page's bytes, what it takes once it is coded.

    Raises:
        BudgetTooSmall: if it is too little for a page a layer and two that come and go.
    """
    row_bytes = batch_size * shape.token_bytes
    assembled = 0 if segments else total_tokens * row_bytes
    index = int(index_share * shape.layers * total_tokens * row_bytes)
    least_page = align_up((page_tokens or 1) * row_bytes, BLOCK_ALIGNMENT_BYTES)
    least = assembled + index + (shape.layers + _LEAST_RING) * least_page
    if kv_bytes < least:
        whole = f"{gib(assembled)} for a layer in one piece, " if assembled else ""
        chosen = f"{gib(index)} to choose pages by, for {batch_size} x {total_tokens} tokens, " if index else ""
        raise BudgetTooSmall(
            f"{gib(kv_bytes)} are for the KV cache, and it takes at least {gib(least)} ({least} bytes): {whole}{chosen}a page "
            f"of {gib(least_page)} for each of {shape.layers} layers, and {_LEAST_RING} that come and go. Give it more "
            "(--kv-memory, kv_memory=), or reserve for less (max_tokens, batch_size)",
            least,
        )
    room = kv_bytes - assembled - index
    page_bytes = least_page
    if page_tokens is None:
        # A power of two: a disk reads 511 units more slowly than 512.
        wanted = 1 << max(0, (room // (_OPEN_SHARE * shape.layers)).bit_length() - 1)
        most = align_up(total_tokens * row_bytes, BLOCK_ALIGNMENT_BYTES)
        page_bytes = max(least_page, min(wanted, _LARGEST_PAGE_BYTES, most))
        # What it is coded to takes whole units of the disk too.
        coded = align_up(BLOCK_ALIGNMENT_BYTES * 100 // stored_percent, BLOCK_ALIGNMENT_BYTES)
        if coded * (shape.layers + _LEAST_RING) <= room:
            page_bytes = max(page_bytes, coded)
    count = room // page_bytes
    layer_pages = -(-total_tokens * row_bytes // page_bytes)
    free = count - shape.layers
    ring = max(_LEAST_RING, min(layer_pages, free // _RING_SHARE, _RING_BYTES // page_bytes))
    if shape.layers * layer_pages + _LEAST_RING <= free:
        # Everything stays.
        ring = _LEAST_RING
    return KvPages(page_bytes, count, ring, assembled + index)


def paged_ways(
    shape: KvShape,
    batch_size: int,
    total_tokens: int,
    memory_bytes: int | None,
    segments: Sequence[bool],
    stored_percent: int = 100,
    kept_share: float = 1.0,
    page_tokens: int | None = None,
    index_share: float = 0.0,
    anyway: bool = False,
) -> list[PagedKv]:
    """How keys and values could be kept in pages; what is computed with as they are first, then by how much stays.

    Args:
        memory_bytes: that was asked for; None: try a half of what all takes, a quarter, and so on.
        segments: which ways to read them there are.
        kept_share: of the tokens of all sequences, those that are kept: what sequences share is kept once.
        page_tokens: of each sequence in one page; None for what suits the memory.
        index_share: of all bytes, what a policy keeps on the device to choose by.
        anyway: where a share of so few tokens is less than pages take, what they take.

    Raises:
        BudgetTooSmall: if what was asked for is too little either way.
    """
    whole = _ROOM_TO_STAY * batch_size * total_tokens * shape.all_token_bytes
    most = int(whole * (kept_share * stored_percent / 100 + index_share)) + int(whole) // total_tokens
    if anyway:
        # So that everything stays where pages, which are whole units of the disk, are large beside what they hold.
        most += _SPARE_BYTES * shape.layers
        if page_tokens is not None:
            page_bytes = align_up(page_tokens * batch_size * shape.token_bytes, BLOCK_ALIGNMENT_BYTES)
            pages = shape.layers * (-(-total_tokens // page_tokens) + 1) + _LEAST_RING
            most = max(most, pages * page_bytes + int(index_share * whole))
    found, refusals = [], []
    for one in segments:
        tried = [memory_bytes] if memory_bytes is not None else [most >> step for step in range(most.bit_length())]
        for size in tried:
            try:
                cut(shape, batch_size, total_tokens, size, one, page_tokens, index_share, stored_percent)
            except BudgetTooSmall as error:
                refusals.append(error)
                break
            found.append(PagedKv(size, one, stored_percent))
    if not found and memory_bytes is not None:
        raise min(refusals, key=lambda error: error.least_bytes)
    if not found and anyway:
        least = min(error.least_bytes for error in refusals)
        return paged_ways(
            shape, batch_size, total_tokens, least, segments, stored_percent, page_tokens=page_tokens, index_share=index_share
        )
    return found


class PageResidency(Generic[Page]):
    """Which full pages stay on the device.

    Any fixed set would do, since all are read in turn; an even one among layers gives the link something to do while every
    layer computes.

    Args:
        limit: pages that may stay.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._layers: dict[Hashable, deque[Page]] = {}
        self._layer_of: dict[Page, Hashable] = {}

    def add(self, layer: Hashable, page: Page) -> None:
        """A page of a layer is full, and on the device."""
        self._layers.setdefault(layer, deque()).append(page)
        self._layer_of[page] = layer

    def remove(self, page: Page) -> None:
        """A page is freed; nothing happens if it had gone already."""
        layer = self._layer_of.pop(page, None)
        if layer is not None:
            self._layers[layer].remove(page)
            if not self._layers[layer]:
                del self._layers[layer]

    def next_to_go(self, anyway: bool = False) -> tuple[Hashable, Page] | None:
        """The page to move down now and its layer, taken off the list; None if all may stay.

        Args:
            anyway: more room is needed than was meant.
        """
        if len(self._layer_of) <= (0 if anyway else max(0, self.limit)):
            return None
        layer = max(self._layers, key=lambda key: len(self._layers[key]))
        page = self._layers[layer][0]
        self.remove(page)
        return layer, page


def coming(layers: Sequence[Sequence[Item]], layer: int, done: int) -> Iterator[Item]:
    """What will be read, in that order.

    Args:
        layers: of each layer, in the order in which layers compute, what it reads.
        layer: which one is being read.
        done: how much of it was read.

    Yields:
        What is left of this layer, then of the next ones, and round to the next token's first layers.
    """
    yield from islice(layers[layer], done, None)
    for step in range(1, len(layers)):
        yield from layers[(layer + step) % len(layers)]


def cpu_reads_pages(hardware: HardwareProfile | None) -> bool:
    """Whether the CPU reads keys and values in its memory faster than the link brings them to the device.

    What goes to and fro for it, queries and results, is nothing beside them.
    """
    if hardware is None or hardware.h2d is None:
        return False
    return CPU_ATTENTION_SHARE * hardware.host.memory_bytes_per_second > hardware.h2d.bytes_per_second


def streamed_bytes(shape: KvShape, pages: KvPages, batch_size: int, tokens: int) -> int:
    """Bytes of full pages that a pass after `tokens` reads from lower tiers: the least there is, since all are read."""
    page_tokens = max(1, pages.page_bytes // (batch_size * shape.token_bytes))
    full = shape.layers * (max(0, tokens - 1) // page_tokens)
    return max(0, full - pages.resident_pages(shape.layers)) * pages.page_bytes
