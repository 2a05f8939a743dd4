"""What shows that a session computes with the bytes that it streamed."""

import torch

from offload import Session


def poison_homes(session: Session) -> int:
    """Fill the CPU homes of everything that is streamed with NaN; the number of tensors that were.

    Without this, a runtime that streams nothing would pass every test of equality: the homes are valid operands.
    """
    placement = session._placement
    blocks = (*placement.streamed.values(), *placement.tables.values())
    homes = {home.name: home for block in blocks for home in block.homes}
    for home in homes.values():
        home.tensor.detach().fill_(torch.nan)
    return len(homes)


class DiskMeter:
    """Bytes that the disk link moved since this was made."""

    def __init__(self, session: Session) -> None:
        self._link = session._link
        self._before = self._link.bytes_moved

    @property
    def nbytes(self) -> int:
        return self._link.bytes_moved - self._before
