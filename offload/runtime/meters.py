"""The instruments of a session: what its tiers hold, what its links moved, when."""

from dataclasses import replace

from offload.report.facts import LinkUse, Peak, TierUse
from offload.runtime.recorder import Recorder
from offload.scheduler.plan import Plan
from offload.storage.blocks import Tier
from offload.storage.devices.base import Device
from offload.storage.ledger import MemoryLedger
from offload.storage.process_memory import process_bytes
from offload.storage.reader import DiskReader
from offload.storage.transfer import Link

_PROBE_BYTES = 256 << 20
_PROBE_SHARE = 0.05
"""The report's own measurement reads at most this part of what the session streamed."""


_RESERVED = ("layer inputs", "KV cache", "activations")

_BESIDE_BYTES = 14 << 20
"""On the CPU: stacks of threads, caches of kernels, Python's objects of a session."""

_KEPT_SHARE = 0.65
"""What a CPU's allocator holds in pieces besides, as a share of what comes and goes (activations, KV cache)."""


def predicted_peak_bytes(plan: Plan, shares_host_memory: bool) -> int:
    """Predict the peak of the device that computes.

    Args:
        shares_host_memory: its memory is the host's, whose allocator keeps pieces.
    """
    if not shares_host_memory:
        return plan.device_bytes
    return plan.device_bytes + _BESIDE_BYTES + _pieces(plan)


def bytes_between_layers(before_bytes: int, budget_bytes: int, plan: Plan) -> int:
    """What a process may hold between two layers, on the CPU: nothing of what comes and goes, nor of its pieces.

    Not the KV cache either, though it may be there already: what kernels keep would have taken its place before it grew.

    Args:
        before_bytes: what it held before the session.
        budget_bytes: of the session.
    """
    return before_bytes + budget_bytes - _coming_and_going(plan) - _pieces(plan)


def _coming_and_going(plan: Plan) -> int:
    return plan.kv.reserved_bytes + plan.activation_bytes


def _pieces(plan: Plan) -> int:
    return int(_KEPT_SHARE * _coming_and_going(plan))


class CopyMeter:
    """Adds up the copies of one device, whoever asked for them."""

    def __init__(self, device: Device, recorder: Recorder) -> None:
        self.copied_bytes = 0
        self.copy_seconds = 0.0
        self._device = device
        self._recorder = recorder

    def collect(self) -> None:
        """Note the copies that have ended."""
        for copy in self._device.ended_copies():
            self.copied_bytes += copy.nbytes
            self.copy_seconds += copy.end_seconds - copy.begin_seconds
            self._recorder.span(self._device.copy_link, copy.name, copy.begin_seconds, copy.end_seconds, copy.nbytes)


class Meters:
    """Reads the instruments of a session.

    Args:
        copies: of the device.
        ledger, host_ledger, disk_ledger: of its tiers; the first two are one where the device's memory is the host's.
    """

    def __init__(
        self, device: Device, copies: CopyMeter, ledger: MemoryLedger, host_ledger: MemoryLedger, disk_ledger: MemoryLedger
    ) -> None:
        self.copy_speed: float | None = None
        """Bytes a second from host to device, measured when the slots were taken."""
        self._device = device
        self._copies = copies
        self._ledger, self._host_ledger, self._disk_ledger = ledger, host_ledger, disk_ledger
        self._process_peak_bytes = 0
        self._on_card_before = device.peak_bytes() or 0

    def sample_peak(self) -> None:
        """After a pass: what the allocator took for it, it mostly keeps. A card tells of its own peak."""
        if self._device.shares_host_memory:
            self._process_peak_bytes = max(self._process_peak_bytes, process_bytes())

    def peak(self, plan: Plan, before_bytes: int, extra_bytes: int = 0) -> Peak:
        """The peak of the device that computes.

        Args:
            before_bytes: what the process held before the session, without weights that the session moves.
            extra_bytes: what training holds beside the plan.
        """
        shares_host_memory = self._device.shares_host_memory
        on_card = self._device.peak_bytes()
        measured = None if on_card is None else on_card - self._on_card_before
        if shares_host_memory:
            measured = self._process_peak_bytes - before_bytes if self._process_peak_bytes else None
        return Peak(predicted_peak_bytes(plan, shares_host_memory) + extra_bytes, measured)

    def tier_uses(self, before_bytes: int) -> dict[str, TierUse]:
        """Sum up each tier, by name.

        Args:
            before_bytes: what the process held before the session.
        """
        ledgers = {Tier.DEVICE: self._ledger, Tier.CPU: self._host_ledger, Tier.DISK: self._disk_ledger}
        if self._device.shares_host_memory:
            ledgers[Tier.DEVICE] = MemoryLedger(Tier.DEVICE, 0)
        unaccounted = {Tier.CPU: max(0, process_bytes() - before_bytes - self._held(self._host_ledger))}
        on_card = self._device.peak_bytes()
        if on_card is not None:
            unaccounted[Tier.DEVICE] = max(0, on_card - self._ledger.peak_bytes)
        return {tier.value: TierUse.of(ledger, unaccounted.get(tier)) for tier, ledger in ledgers.items()}

    def _held(self, ledger: MemoryLedger) -> int:
        """Without what is only set aside."""
        return ledger.used_bytes - sum(ledger.held_bytes(category) for category in _RESERVED)

    def link_uses(self, link: Link, writes: Link, reader: DiskReader, lent: memoryview | None) -> dict[str, LinkUse]:
        """Sum up each link by name, with what the disk gives right now, where what was streamed is enough to compare with.

        Args:
            lent: memory to read into; nothing is measured without.
        """
        # What was prefetched would compete with the measurement.
        link.wait_idle()
        self._copies.collect()
        speed = None
        if lent is not None:
            speed = reader.measure(min(_PROBE_BYTES, int(link.bytes_moved * _PROBE_SHARE)), memory=lent)
        measured = {"disk": speed, self._device.copy_link: self.copy_speed}
        return {
            name: replace(use, measured_bytes_per_second=measured.get(name))
            for name, use in self.link_sums(link, writes).items()
        }

    def link_sums(self, link: Link, writes: Link) -> dict[str, LinkUse]:
        """Sum up each link by name, without a measurement."""
        uses = {"disk": LinkUse.of(link.bytes_moved, link.busy_seconds)}
        if writes.bytes_moved:
            uses["disk writes"] = LinkUse.of(writes.bytes_moved, writes.busy_seconds)
        if not self._device.shares_host_memory:
            uses[self._device.copy_link] = LinkUse.of(self._copies.copied_bytes, self._copies.copy_seconds)
        return uses
