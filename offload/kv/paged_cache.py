"""The pages of a session's KV caches: which caches get them, where they are, what became of them."""

from contextlib import ExitStack
from typing import Any

from torch import nn

from offload.kv.attention_backend import PagedAttention
from offload.kv.options import KvOptions
from offload.kv.state_offload import StateOffloader
from offload.kv.store import KvStore
from offload.kv.transformers_cache import PagedLayers
from offload.model.caches import new_cache
from offload.runtime.machine import Machine
from offload.scheduler.hardware import HardwareProfile
from offload.scheduler.kv_pages import KvPages, KvShape, cpu_reads_pages, cut, streamed_bytes
from offload.scheduler.model_spec import Workload
from offload.scheduler.plan_sections import KvPlan
from offload.storage.blocks import Tier
from offload.storage.errors import BudgetExceeded, gib
from offload.storage.pages.file import PageFile
from offload.storage.pages.pool import STAGING_PAGES, PagePool

CATEGORY = "KV cache"
_PAGES = "pages of the KV cache"

_SEALED_SHARE = 3
"""Where full pages are coded, the others have this part of the memory at most."""


class PagedCache:
    """Pages for the caches of one session.

    Args:
        shape: of the model's cache.
        workload: what the pages are cut for.
        hardware: tells whether the CPU reads pages in its memory sooner than the device gets them; None if not measured.
    """

    def __init__(
        self,
        machine: Machine,
        options: KvOptions,
        plan: KvPlan,
        shape: KvShape,
        workload: Workload,
        hardware: HardwareProfile | None,
    ) -> None:
        self.options = options
        self.shape = shape
        self._plan = plan
        self._workload = workload
        self._machine = machine
        self.pages = self._cut(plan.memory_bytes)
        pages, codec = self.pages, options.method.codec
        self._raw_pages = pages.device_pages
        if codec is not None:
            # The open ones, and a few that no code is good enough for, which go to disk.
            self._raw_pages = shape.layers + max(2, (pages.device_pages - shape.layers) // _SEALED_SHARE)
        self.store = KvStore(
            self._pool(pages.page_bytes, self._raw_pages, plan.host_bytes if codec is None else 0),
            pages.ring_pages if codec is None else 1,
            pages.resident_pages(shape.layers) if codec is None else 1,
            codec,
            self._coded_pool,
            cpu_attends=plan.segments and machine.discrete and cpu_reads_pages(hardware),
            warn=machine.notes.warn,
            page_tokens=options.tokens_a_page(workload.total_tokens),
        )
        state_offloader = StateOffloader(self.store) if plan.state_offload else None
        self._layers = PagedLayers(self.store, options.layer_policy(), plan.segments, state_offloader)

    def open(self, model: nn.Module, stack: ExitStack) -> None:
        """Take memory, and the place of the model's attention where that is needed; all undone by `stack`."""
        host, disk = self._machine.host.ledger, self._machine.host.disk_ledger
        if self._plan.host_bytes:
            host.charge(_PAGES, self._plan.host_bytes)
            stack.callback(lambda: host.set(_PAGES, 0))
        stack.callback(lambda: disk.set(CATEGORY, 0))
        stack.callback(self.store.close)
        if self._plan.segments:
            stack.callback(PagedAttention(model).undo)

    def adopt(self, cache: Any) -> bool:
        """Give a new cache paged layers; whether it has them."""
        return cache is not None and self._layers.adopt(cache)

    def new_cache(self, model: nn.Module) -> Any:
        """An empty cache with paged layers."""
        cache = new_cache(model)
        self.adopt(cache)
        return cache

    def check(self, batch_size: int, context_tokens: int) -> None:
        """Raise BudgetExceeded if a layer could not be put together after a pass with so many tokens."""
        if self._plan.segments:
            return
        needed = batch_size * context_tokens * self.shape.token_bytes
        if needed > self.pages.assembled_bytes:
            raise BudgetExceeded(
                f"{batch_size} x {context_tokens} tokens of one layer take {gib(needed)} in one piece, and the KV cache was "
                f"laid out for {self._workload.batch_size} x {self._workload.total_tokens}; enter with the batch_size and "
                "max_tokens that will be used"
            )

    def observe(self) -> None:
        """A pass is over."""
        self._machine.host.disk_ledger.set(CATEGORY, sum(pool.disk_bytes for pool in self.store.pools))
        if any(pool.unlocked_bytes for pool in self.store.pools) and self._machine.discrete:
            self._machine.notes.warn("the KV cache's pages in CPU memory could not be page-locked: copies from them are slower")

    @property
    def onloaded_bytes(self) -> int:
        """Bytes of pages that came from lower tiers since the session began."""
        return sum(pool.onloaded_bytes for pool in self.store.pools)

    @property
    def written_bytes(self) -> int:
        """Bytes of pages that went to lower tiers."""
        return sum(pool.written_bytes for pool in self.store.pools)

    def usage(self) -> dict[str, int | str]:
        """Sum up the pages for the report."""
        peaks = {f"peak_{tier.value}_bytes": self.store.peak_bytes[tier] for tier in Tier}
        return {
            "policy": self.options.policy,
            "budget": self.options.seen,
            "memory_bytes": self._plan.memory_bytes,
            "page_bytes": self.pages.page_bytes,
            **peaks,
            "onloaded_bytes": self.onloaded_bytes,
            "written_bytes": self.written_bytes,
            "planned_bytes_per_pass": self._planned_bytes(),
            "full_pages": self.store.sealed,
            "unquantized_pages": self.store.kept_raw,
        }

    def _planned_bytes(self) -> int:
        """What a pass at the end reads where everything is read as it is: what does not stay, once."""
        if self.options.is_lossy:
            return 0
        return streamed_bytes(self.shape, self.pages, self._workload.batch_size, self._workload.total_tokens)

    def _cut(self, memory_bytes: int) -> KvPages:
        workload, options, percent = self._workload, self.options, self._plan.stored_percent
        sizes = workload.batch_size, workload.total_tokens, memory_bytes
        page_tokens = options.tokens_a_page(workload.total_tokens)
        return cut(
            self.shape,
            *sizes,
            self._plan.segments,
            page_tokens,
            options.index_share,
            percent,
        )

    def _pool(self, page_bytes: int, device_pages: int, host_bytes: int) -> PagePool:
        # What passes between disk and device is part of it.
        machine, host_pages = self._machine, max(0, host_bytes // page_bytes - STAGING_PAGES)
        reads, writes = machine.host.reads, machine.host.writes
        return PagePool(
            machine.device, page_bytes, device_pages, host_pages, self._open_file, reads, writes, machine.clock.charge_wait
        )

    def _coded_pool(self, page_bytes: int) -> tuple[PagePool, int, int]:
        """Make a pool for encoded pages, in what the others leave of the memory."""
        pages = self.pages
        room = pages.page_bytes * (pages.device_pages - self._raw_pages)
        count = max(3, room // page_bytes)
        ring = max(2, min(pages.ring_pages, count // 3))
        return self._pool(page_bytes, count, self._plan.host_bytes), ring, count - ring - 1

    def _open_file(self, page_bytes: int) -> PageFile:
        file = PageFile(self._machine.host.disk_dir, page_bytes)
        if not file.direct:
            self._machine.notes.warn(
                "the disk folder refuses O_DIRECT: pages of the KV cache go through the page cache and are dropped from it"
            )
        return file
