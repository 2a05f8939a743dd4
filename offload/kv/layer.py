"""One layer's keys and values, as a list of blocks of pages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from offload.kv.assembly import assemble
from offload.kv.kv_block import BatchRows, KvBlock
from offload.kv.page_layout import KeyValue, PageLayout
from offload.kv.policies.base import LayerPolicy, Selection
from offload.kv.reading import Reading
from offload.kv.store import KvStore
from offload.storage.blocks import Tier
from offload.storage.errors import ConfigError
from offload.storage.pages.pool import Page


class AppendOrder(list["PagedLayer"]):
    """The layers of one cache, in the order in which they compute.

    Attributes:
        broken: what failed in the middle of a pass; the layers do not hold the same tokens since.
    """

    broken: BaseException | None = None

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What fails leaves a cache that is wrong: it is not used any more."""
        if self.broken is not None:
            raise ConfigError(f"this KV cache broke off before ({self.broken}): begin again with a new one")
        try:
            yield
        except BaseException as error:
            self.broken = error
            raise


class PagedLayer:
    """Keys and values of one layer of one cache.

    Args:
        store: where the pages are.
        policy: which of them are kept, and read.
        order: the layers of the cache so far; this one comes after them.
    """

    def __init__(self, store: KvStore, policy: LayerPolicy, order: AppendOrder) -> None:
        self.store = store
        self.policy = policy
        self.length = 0
        """Tokens of each sequence so far, dropped ones included: the next one's position."""
        self.blocks: list[KvBlock] = []
        self.kind: PageLayout | None = None
        """What its tokens are like; None before the first one."""
        self.order = order
        order.append(self)
        self._open: KvBlock | None = None

    # -- what comes in

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens to every sequence.

        Args:
            keys, values: [batch, heads, tokens, dim].
        """
        done, count = 0, keys.shape[2]
        like = PageLayout.of(keys[:, :, :1], values[:, :, :1])
        if self._open is not None and self._open.shape != self.store.page_shape(like):
            self.close()
        self.kind = like
        while done < count:
            if self._open is None:
                self._open = self.store.open(self, self.store.page_shape(like), self.length)
                self.blocks.append(self._open)
            begin = self._open.tokens
            end = min(begin + count - done, self._open.shape.tokens)
            pair, part = self.store.pair(self._open), slice(done, done + end - begin)
            pair.keys[:, :, begin:end].copy_(keys[:, :, part])
            pair.values[:, :, begin:end].copy_(values[:, :, part])
            self._open.tokens = end
            self.length += end - begin
            done += end - begin
            if end == self._open.shape.tokens:
                self.close()
        for block in self.policy.evict(self.blocks, self.length):
            self._remove(block)

    # -- how it is read

    @property
    def batch_size(self) -> int:
        return self.blocks[-1].batch_size if self.blocks else 0

    def positions(self) -> list[range]:
        """The positions of the tokens that are there."""
        return [range(block.start, block.end) for block in self.blocks]

    def assembled(self) -> KeyValue:
        """All of it in one piece: keys [batch, heads, length, key dim] and values, contiguous.

        Their memory is used again when nobody holds them any more.
        """
        kind = self.kind
        assert kind is not None
        device = self.store.raw.device.torch_device
        lines = (self.batch_size, kind.heads, self.length)
        whole = KeyValue(
            self.store.whole.empty((*lines, kind.key_dim), kind.dtype, device),
            self.store.whole.empty((*lines, kind.value_dim), kind.dtype, device),
        )
        held: list[Reading] = []
        for reading in self.readings([Selection(block) for block in self.blocks], held):
            held.append(reading)
            if len(held) == self.store.pages_at_once or reading.block is self.blocks[-1]:
                assemble(held, whole)
                self.store.done(held)
                held.clear()
        return whole

    def part(self, start: int, end: int) -> KeyValue:
        """Some positions of it, in memory of their own. Raises ConfigError if some were dropped."""
        found = [block for block in self.blocks if block.start < end and block.end > start]
        if sum(min(end, block.end) - max(start, block.start) for block in found) < end - start:
            raise ConfigError("keys and values that a policy dropped were asked for")
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for block in found:
            reading = self.store.read(block)
            inside = slice(max(start, block.start) - block.start, min(end, block.end) - block.start)
            for part, parts in zip(reading.pair, (keys, values), strict=True):
                rows = part if block.rows is None else block.rows.of(part)
                parts.append(rows[:, :, inside].clone())
            reading.done()
        return KeyValue(torch.cat(keys, dim=2), torch.cat(values, dim=2))

    def visible(self, query: torch.Tensor) -> list[Selection]:
        """What a query is to see.

        Args:
            query: [batch, heads, tokens, dim].
        """
        return self.policy.select(self.blocks, self.length, query)

    def readings(self, choices: Sequence[Selection], held: Sequence[Reading] = ()) -> Iterator[Reading]:
        """The blocks, those of lower tiers brought one after another; each to be ended by `done`.

        Args:
            held: those of them that were not ended yet; it changes meanwhile.
        """
        blocks = [choice.block for choice in choices]
        if self.policy.reads_all:
            layers = [layer.blocks for layer in self.order]
            here = next(index for index, layer in enumerate(self.order) if layer is self)
            layers[here] = blocks
        else:
            layers, here = [blocks], 0
        begun = False
        for index, block in enumerate(blocks):
            if not begun and self.store.comes(block):
                self.store.ahead(self._coming(layers, here, index))
                begun = True
            yield self.store.read(block, partial(self._coming, layers, here, index + 1), held)
        if self.policy.reads_all:
            self.store.ahead(self._coming(layers, here, len(blocks)))

    def _coming(self, layers: Sequence[Sequence[KvBlock]], layer: int, done: int) -> Iterator[Page]:
        return self.store.coming(layers, layer, done)

    def bytes_by_tier(self) -> dict[Tier, int]:
        """Bytes of the pages that it holds, shared ones included."""
        held = dict.fromkeys(Tier, 0)
        for block in self.blocks:
            held[block.page.tier] += block.page.pool.page_bytes
        return held

    # -- what `generate` does to it

    def truncate(self, count: int) -> None:
        """Take the last `count` tokens of every sequence away.

        Raises:
            ConfigError: if what would have to be read again was dropped.
        """
        length = max(0, self.length - count)
        self.policy.check_truncation(self.blocks, length)
        while self.blocks and self.blocks[-1].end > length:
            last = self.blocks[-1]
            last.tokens = max(0, length - last.start)
            if last.tokens:
                break
            self._remove(last)
        self.length = length
        self.policy.truncated(self.blocks)

    def select(self, rows: torch.Tensor) -> None:
        """Let the batch be these of its sequences, in this order, some of them several times perhaps.

        Args:
            rows: int64 [new batch].
        """
        rows = rows.to(self.store.raw.device.torch_device)
        if self._open is not None and len(rows) != self._open.shape.rows:
            self.close()
        made: dict[BatchRows | None, BatchRows] = {}
        for block in self.blocks:
            if block is self._open:
                for tensor in self.store.pair(block):
                    part = tensor[:, :, : block.tokens]
                    part.copy_(part.index_select(0, rows))
            else:
                before = block.rows
                block.rows = made.get(before) or made.setdefault(
                    before, BatchRows(rows if before is None else before.of_these(rows))
                )
        self.policy.selected(rows)

    def repeat(self, count: int) -> None:
        """Continue each sequence `count` times: no bytes are copied."""
        self.close()
        self.select(torch.arange(self.batch_size).repeat_interleave(count))

    def clear(self) -> None:
        for block in list(self.blocks):
            self._remove(block)
        self.length = 0
        self.kind = None
        self.policy.truncated(self.blocks)

    def copied(self, order: AppendOrder) -> "PagedLayer":
        """Another layer with the same tokens: full pages are shared."""
        self.close()
        other = PagedLayer(self.store, self.policy.copied(), order)
        other.length, other.kind = self.length, self.kind
        other.blocks = [self.store.share(block) for block in self.blocks]
        return other

    def close(self) -> None:
        """Nothing is added to the open page any more."""
        if self._open is None:
            return
        closing, self._open = self._open, None
        self.policy.sealed(closing, self.store.pair(closing), self.blocks)
        self.store.seal(self, closing)

    def _remove(self, block: KvBlock) -> None:
        self.blocks.remove(block)
        filling = block is self._open
        if filling:
            self._open = None
        self.store.release(self, block, filling)
