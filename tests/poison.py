"""What shows that a session computes with the bytes that it streamed."""

from collections.abc import Sequence

import torch

from offload import Session
from offload.moe.component import ExpertComponent
from offload.moe.streaming import ExpertStreaming


def poison_homes(session: Session) -> int:
    """Fill the CPU homes of everything that is streamed with NaN; the number of tensors that were.

    Without this, a runtime that streams nothing would pass every test of equality: the homes are valid operands.
    """
    overlook_edits(session)
    placement = session._parts.residency.placement
    blocks = (*placement.streamed.values(), *placement.tables.values())
    homes = {home.name: home for block in blocks for home in block.homes}
    experts = session._parts.component(ExpertComponent)
    if experts is not None:
        homes |= {home.name: home for items in experts.homes for home in items}
        poison_slots(experts.streaming)
    for home in homes.values():
        # What stands in for experts is NaN already, and holds no memory.
        if home.tensor.is_contiguous():
            home.tensor.detach().fill_(torch.nan)
        assert home.tensor.isnan().all()
    return len(homes)


def overlook_edits(session: Session) -> None:
    """The session takes what is written to homes for an edit, which poison must not be."""
    session._parts.residency._edits.mark = lambda homes: True  # type: ignore[method-assign]


def poison_slots(streaming: ExpertStreaming) -> None:
    """Slots of experts are NaN until an expert is there, and again while another is on its way."""
    store = streaming.store
    store.arena.fill_(0xFF)
    store.used(range(len(store.arena) // len(store.slot(0))))
    begin = store.begin

    def poisoned(layer: int, expert: int, slot: int, tensors: Sequence[int] = ()) -> None:
        store.cancel(slot)
        store.slot(slot).fill_(0xFF)
        # The fill is compute, which the copy is to wait for, as for any other use of the slot.
        store.used([slot])
        begin(layer, expert, slot, tensors)

    store.begin = poisoned


def finish_loading(session: Session) -> None:
    """Have all resident weights arrive, for which the first pass waits otherwise."""
    session._parts.residency.placement.loading.finish()


class DiskMeter:
    """Bytes that the disk link moved since this was made, resident weights left out."""

    def __init__(self, session: Session) -> None:
        finish_loading(session)
        self._link = session.machine.host.reads
        self._before = self._link.bytes_moved

    @property
    def nbytes(self) -> int:
        return self._link.bytes_moved - self._before


def moved_in_a_pass(session: Session, tokens: torch.Tensor) -> int:
    """Bytes that the disk link moves for one pass after another, what is read ahead counted once."""
    session.model(tokens)
    session.machine.host.reads.wait_idle()
    meter = DiskMeter(session)
    session.model(tokens)
    session.machine.host.reads.wait_idle()
    return meter.nbytes
