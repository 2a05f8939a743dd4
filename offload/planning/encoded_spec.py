"""A model as the planner knows it, if the weights of its layers were encoded."""

from dataclasses import replace

from offload.model.encoding import GROUP
from offload.scheduler.model_spec import BlockRole, ModelSpec, PlacedBlock
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, align_up
from offload.storage.codecs.decode_speed import decoded_bytes_per_second

_BITS = {"int8": 8.0, "int4": 4 + 16 / GROUP, "nf4": 4 + 32 / GROUP}
"""Bits of a number, with its part of a scale."""


def encoded_layers(spec: ModelSpec, kind: str, dtype: str) -> ModelSpec:
    """The same model with `--weights kind`, all of each layer taken for linear weights.

    Args:
        dtype: of the weights, torch's name.
    """
    share = _BITS[kind] / (8 * DTYPE_BYTES[dtype])
    rate = decoded_bytes_per_second(kind, dtype)

    def encoded(block: PlacedBlock) -> PlacedBlock:
        if block.role is not BlockRole.LAYER:
            return block
        stored = int(block.stored_bytes * share)
        return replace(
            block,
            codec=kind,
            stored_bytes=stored,
            encoded_bytes=align_up(stored, BLOCK_ALIGNMENT_BYTES),
            decode_seconds=block.stored_bytes / rate,
        )

    return replace(spec, blocks=tuple(encoded(block) for block in spec.blocks))
