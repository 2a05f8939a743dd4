"""A paged layer by itself, with chosen keys and values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from offload.kv.layer import AppendOrder, PagedLayer
from offload.kv.policies.base import FullAttention, LayerPolicy
from offload.kv.quantization import PageQuantizer
from offload.kv.store import KvStore
from offload.storage.devices.cpu import CpuDevice
from offload.storage.pages.file import PageFile
from offload.storage.pages.pool import PagePool
from offload.storage.transfer import Link


@contextmanager
def store_of(
    page_bytes: int = 1 << 16,
    device_pages: int = 64,
    resident_pages: int = 32,
    page_tokens: int | None = None,
    codec: PageQuantizer | None = None,
    folder: str | None = None,
) -> Iterator[KvStore]:
    """On the CPU, with disk below."""
    reads, writes = Link("disk", 2), Link("disk writes", 2)

    def pool(nbytes: int, pages: int = device_pages) -> PagePool:
        return PagePool(CpuDevice(), nbytes, pages, 0, lambda size: PageFile(folder, size), reads, writes)

    store = KvStore(
        pool(page_bytes), 4, resident_pages, codec, lambda nbytes: (pool(nbytes), 4, resident_pages), page_tokens=page_tokens
    )
    try:
        yield store
    finally:
        store.close()
        reads.close()
        writes.close()


@contextmanager
def layer_of(
    keys: torch.Tensor,
    values: torch.Tensor,
    page_tokens: int,
    policy: Callable[[], LayerPolicy] = FullAttention,
    codec: PageQuantizer | None = None,
) -> Iterator[PagedLayer]:
    """Args: keys, values: [batch, heads, tokens, dim]."""
    with store_of(page_tokens=page_tokens, codec=codec) as store:
        layer = PagedLayer(store, policy(), AppendOrder())
        layer.append(keys, values)
        yield layer
