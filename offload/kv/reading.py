"""A block of keys and values that is being read."""

from collections.abc import Callable
from functools import cached_property

from offload.kv.kv_block import KvBlock
from offload.kv.page_layout import KeyValue
from offload.storage.blocks import Tier
from offload.storage.devices.base import Event
from offload.storage.pages.pool import PageFetch


class Reading:
    """A block that can be read, until `done`.

    Args:
        pair: makes the tensors of all of the page's tokens.
        fetch: what brought the page into a slot of the ring, if anything did.
    """

    def __init__(self, block: KvBlock, pair: Callable[[], KeyValue], fetch: PageFetch | None) -> None:
        self.block = block
        self._pair = pair
        self._fetch = fetch

    @cached_property
    def pair(self) -> KeyValue:
        """Keys and values of the page's rows, which may be other ones than the batch's."""
        return KeyValue(*(part[:, :, : self.block.tokens] for part in self._pair()))

    @property
    def is_lent(self) -> bool:
        """Its memory is given back by `done`."""
        return self._fetch is not None

    @property
    def slot(self) -> int | None:
        """Which of its pool's slots on the device it is in; None where the CPU reads it."""
        if self._fetch is not None:
            return self._fetch.slot
        return self.block.page.place if self.block.page.tier is Tier.DEVICE else None

    def follows(self, before: "Reading") -> bool:
        """True if it lies right behind the block before it, and both are full pages that every sequence reads as they are."""
        block, last = self.block, before.block
        if self.slot is None or before.slot is None or block.page.pool is not last.page.pool:
            return False
        plain = not (block.coded or last.coded) and block.rows is None and last.rows is None
        full = block.shape == last.shape and block.start == last.end and block.tokens == last.tokens == block.shape.tokens
        return plain and full and block.page.pool.slots.follows(self.slot, before.slot)

    def done(self, after: Event | None = None) -> None:
        """The compute that reads it was submitted: all of it, or what `after` was recorded behind."""
        if self._fetch is not None:
            self._fetch.release(after)
