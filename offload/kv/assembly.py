"""A layer's blocks, put together into one piece."""

from collections.abc import Sequence

from offload.kv.page_layout import KeyValue
from offload.kv.reading import Reading


def assemble(readings: Sequence[Reading], whole: KeyValue) -> None:
    """Copy blocks to where their tokens belong: neighbours in memory by one copy of keys and one of values.

    Args:
        whole: keys [batch, heads, length, key dim] and values.
    """
    for run in _runs(readings):
        block = run[0].block
        if len(run) > 1:
            for part, target in zip(_together(run), whole, strict=True):
                target[:, :, block.start : run[-1].block.end].unflatten(2, (len(run), -1)).copy_(part)
            continue
        for part, target in zip(run[0].pair, whole, strict=True):
            target[:, :, block.start : block.end].copy_(part if block.rows is None else block.rows.of(part))


def _runs(readings: Sequence[Reading]) -> list[list[Reading]]:
    runs: list[list[Reading]] = []
    for reading in readings:
        if runs and reading.follows(runs[-1][-1]):
            runs[-1].append(reading)
        else:
            runs.append([reading])
    return runs


def _together(run: Sequence[Reading]) -> KeyValue:
    """Keys [rows, heads, blocks, tokens of one, key dim] of neighbours, and values."""
    first = run[0]
    assert first.slot is not None
    pages = first.block.page.pool.slots.span(first.slot, len(run)).view(len(run), -1)
    return KeyValue(*(part.permute(1, 2, 0, 3, 4) for part in first.block.shape.views_of_all(pages)))
