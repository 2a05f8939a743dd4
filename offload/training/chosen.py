"""Which weights will be trained, as far as a model tells before its session."""

from torch import nn

from offload.model.blocks import find_structure
from offload.scheduler.model_spec import BlockRole
from offload.training.options import CPU, Training

_LITTLE = 4
"""What is trained of a block is little if it is at most this part of a layer."""


def chosen_parameters(model: nn.Module, training: Training) -> list[nn.Parameter]:
    """What will be trained, as far as the model tells: some weights require a gradient, and others do not.

    Where all do, adapters may come yet.
    """
    parameters = list(model.parameters())
    chosen = [value for value in parameters if value.requires_grad]
    if training.full:
        return parameters
    return chosen if len(chosen) < len(parameters) else []


def held_parameters(model: nn.Module, training: Training, discrete: bool) -> tuple[nn.Parameter, ...]:
    """What is trained and never streamed.

    The little that is trained of a block (adapters, norms), so that the block goes on coming from where it is; and all of it
    where weights are stepped in the memory that computes.
    """
    if training.full:
        return ()
    chosen = chosen_parameters(model, training)
    if not discrete and training.state_tier == CPU:
        return tuple(chosen)
    ids = {id(value) for value in chosen}
    structure = find_structure(model)
    held = list(structure.always_resident.values())
    layer_bytes = max((unit.block.nbytes for unit in structure.units if unit.role is BlockRole.LAYER), default=0)
    for unit in structure.units:
        trained_here = [value for value in unit.parameters.values() if id(value) in ids]
        if sum(value.nbytes for value in trained_here) * _LITTLE <= layer_bytes:
            held += trained_here
    return tuple(value for value in held if id(value) in ids)
