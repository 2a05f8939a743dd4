"""What of the weights lives in CPU memory beside a device with memory of its own."""

from collections.abc import Sequence

from offload.scheduler.model_spec import ModelSpec, PlacedBlock
from offload.scheduler.plan import Plan
from offload.storage.blocks import BlockKey
from offload.storage.errors import BudgetTooSmall, gib

_STAGING_BUFFERS = 3
"""Between disk and the device: one being read, one being copied, one ready."""


def spread(layers: Sequence[PlacedBlock]) -> list[PlacedBlock]:
    """The layers in an order of which every beginning lies evenly among them (van der Corput, base 2)."""

    def reversed_bits(index: int) -> float:
        value, weight = 0.0, 0.5
        while index:
            value += weight * (index & 1)
            index >>= 1
            weight /= 2
        return value

    count = len(layers)
    order = sorted(range(1 << max(count - 1, 0).bit_length()), key=reversed_bits)
    return [layers[index] for index in order if index < count]


def blocks_in_host_memory(model: ModelSpec, streamed: Sequence[PlacedBlock], host_bytes: int) -> tuple[set[BlockKey], int]:
    """The streamed blocks that CPU memory has room for, spread evenly, so that the disk has time for the others.

    Returns:
        Their keys, and the number of staging buffers through which the others pass.
    """
    # A block that is loaded once, to stay, passes through a buffer of its own, as plain tensors.
    loaded = max((block.slot_bytes for block in model.blocks), default=0)
    if sum(block.host_bytes for block in streamed) + loaded <= host_bytes:
        return {block.key for block in streamed}, 0
    largest = max((block.host_bytes for block in streamed), default=0)
    if host_bytes < loaded + largest:
        raise BudgetTooSmall(
            f"the CPU memory budget is {gib(host_bytes)}, and blocks on their way from disk to the device take "
            f"{gib(loaded + largest)} of it. Give a larger cpu_memory.",
            loaded + largest,
            of_host=True,
        )
    staging = min(_STAGING_BUFFERS, (host_bytes - loaded) // largest)
    room = host_bytes - loaded - staging * largest
    chosen: set[BlockKey] = set()
    for block in spread(streamed):
        if block.host_bytes <= room:
            room -= block.host_bytes
            chosen.add(block.key)
    return chosen, staging


def tables_in_host_memory(model: ModelSpec, tables: Sequence[PlacedBlock], left_bytes: int) -> set[BlockKey]:
    """The tables that fit beside all streamed blocks: a row from memory takes no request to the disk."""
    # What is loaded once, to stay, passes through a buffer.
    left_bytes -= max((block.slot_bytes for block in model.blocks), default=0)
    chosen: set[BlockKey] = set()
    if model.experts is None:
        for block in tables:
            if block.slot_bytes <= left_bytes:
                left_bytes -= block.slot_bytes
                chosen.add(block.key)
    return chosen


def weights_in_host_memory(plan: Plan, model: ModelSpec) -> int:
    """Bytes of CPU memory that a plan takes for blocks that live there, and for those that pass through."""
    blocks, weights = plan.parts_of(model), plan.weights
    plain = sum(blocks[key].slot_bytes for key in (*weights.tables_in_host_memory, *weights.computed_on_host))
    passing = [blocks[key].host_bytes for key in weights.streamed if key not in weights.in_host_memory]
    staging = weights.staging_count * max(passing, default=0)
    return plain + sum(blocks[key].host_bytes for key in weights.in_host_memory) + staging
