"""The work of a pass from the sizes of its blocks alone, for models whose code cannot be run without values."""

from offload.scheduler.model_spec import BlockRole, ModelSpec, PlacedBlock
from offload.scheduler.work import ModuleWork, PassWork, Work

_OPERATIONS = 80
"""Operations of one layer: about what the decoders take that can be counted."""


def estimated_pass(spec: ModelSpec, phase: str, batch_size: int, tokens: int) -> PassWork:
    """Every module once, two FLOPs a weight and row; attention is not counted."""
    blocks = {block.key: block for block in spec.blocks}
    modules = tuple(
        ModuleWork(keys[0], keys, _work([blocks[key] for key in keys], batch_size * tokens))
        for keys in spec.co_resident_blocks
        if keys
    )
    return PassWork(phase, batch_size, tokens, modules, Work(), exact=False)


def _work(blocks: list[PlacedBlock], rows: int) -> Work:
    layers = sum(block.role is BlockRole.LAYER for block in blocks)
    flops = sum(2.0 * rows * block.stored_bytes / 2 for block in blocks)
    return Work(_OPERATIONS * max(1, layers), ((rows, flops),))
