"""What is streamed as one: the blocks of a model, found by structure and not by name."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from offload.scheduler.model_spec import BlockRole
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, DTYPE_BYTES, BlockKey, BlockSpec, TensorSpec
from offload.storage.errors import UnsupportedCheckpoint

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""These have no forward: what they hold is called instead."""


_LEAST_ROWS = 16
"""A product with fewer outputs is not worth dividing."""

_READ_AT_ONCE = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""torch's own fast path reads the weights of everything inside without calling it."""


class HasParameters(Protocol):
    """Whatever has parameters by name: a unit, or the experts of a layer."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...


@dataclass(slots=True, eq=False)
class Unit:
    """A module that is onloaded: while it runs, its parameters are on the device.

    Attributes:
        key: the module's path in the model; also the key of the block that it owns.
        role: what the planner makes of its block.
        parameters: owned by this unit, by their paths in the model.
        uses: keys of the blocks that hold the unit's parameters: its own, and those that own tied ones.
        gathers: True for an embedding, which can do with the rows that it looks up.
    """

    key: BlockKey
    module: nn.Module
    role: BlockRole
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    uses: tuple[BlockKey, ...] = ()
    fetches_rows: bool = False

    @property
    def block(self) -> BlockSpec:
        return BlockSpec(self.key, tuple(tensor_spec(name, value) for name, value in self.parameters.items()))


@dataclass(slots=True)
class Structure:
    """A model taken apart.

    Attributes:
        units: in the order of the model's definition.
        always_resident: parameters of modules that contain blocks or units; they always stay on the device.
        by_leaf: True if there is no repeated list, so that single leaf modules are streamed.
    """

    units: list[Unit]
    always_resident: dict[str, nn.Parameter]
    by_leaf: bool


@dataclass(frozen=True, slots=True)
class TakenApart:
    """Which units are streamed by their sub-modules.

    Attributes:
        keys: of the units.
        whole: modules that stay in one piece, since their code reads weights of what is inside of them.
    """

    keys: frozenset[BlockKey] = frozenset()
    whole: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.keys)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of both kinds, by their paths in the model now."""
        return {path: model.get_submodule(path) for path in (*self.keys, *self.whole)}

    def where_they_are(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> "TakenApart":
        """The same modules, after some were removed from the model or moved in it."""
        paths = {id(module): path for path, module in model.named_modules()}
        now = {path: paths.get(id(module)) for path, module in modules.items()}
        return TakenApart(
            frozenset(path for key in self.keys if (path := now[key]) is not None),
            frozenset(path for key in self.whole if (path := now[key]) is not None),
        )


WHOLE_BLOCKS = TakenApart()


def tensor_spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The tensor's description.

    Raises:
        UnsupportedCheckpoint: for a dtype or a kind of tensor that cannot be moved as plain bytes.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_BYTES or type(tensor.data) is not torch.Tensor or tensor.layout is not torch.strided:
        raise UnsupportedCheckpoint(f"{name} is a {type(tensor.data).__name__} of {tensor.dtype}, not a plain tensor")
    return TensorSpec(name, dtype, tuple(tensor.shape))


def find_structure(
    model: nn.Module,
    by_submodule: TakenApart = WHOLE_BLOCKS,
    excluded: Sequence[nn.Parameter] = (),
    held: Sequence[nn.Parameter] = (),
) -> Structure:
    """Take `model` apart: the children of every outermost repeated list, and the leaves outside of them.

    Args:
        by_submodule: units that are too large for a slot and are taken apart further.
        excluded: parameters that are no part of the structure: experts that are brought one by one.
        held: parameters that always stay on the device, whatever unit they are in.
    """
    always_held = {id(parameter) for parameter in held}
    left_out = {id(parameter) for parameter in excluded} | always_held
    found = list(_modules_to_call(model, "", by_submodule))
    units = [Unit(key, module, role) for key, module, role in found]
    inside = {id(module) for unit in units for module in unit.module.modules()}
    owners: dict[int, BlockKey | None] = {}
    always_resident: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) in always_held:
                always_held.remove(id(parameter))
                always_resident[name] = parameter
            elif id(module) not in inside and id(parameter) not in left_out and owners.setdefault(id(parameter), None) is None:
                always_resident.setdefault(name, parameter)
    for unit in units:
        _assign_owner(unit, owners, left_out)
    _mark_tables(units)
    has_layers = any(unit.role is BlockRole.LAYER for unit in units)
    # A layer whose weights are all held is one still: backward computes it again.
    wrapped = [unit for unit in units if unit.uses or unit.role is BlockRole.LAYER]
    return Structure(wrapped, always_resident, not has_layers)


def _assign_owner(unit: Unit, owners: dict[int, BlockKey | None], left_out: set[int]) -> None:
    """A parameter belongs to the first unit that holds it; a tied one is used by later units and not owned again."""
    uses: dict[BlockKey, None] = {}
    for name, parameter in unit.module.named_parameters(unit.key):
        if not parameter.numel() or id(parameter) in left_out:
            continue
        if id(parameter) not in owners:
            owners[id(parameter)] = unit.key
            unit.parameters[name] = parameter
        owner = owners[id(parameter)]
        if owner is not None:
            uses[owner] = None
    unit.uses = tuple(uses)


def _mark_tables(units: list[Unit]) -> None:
    for unit in units:
        module = unit.module
        if isinstance(module, nn.Embedding) and module.max_norm is None and list(unit.parameters) == [f"{unit.key}.weight"]:
            unit.fetches_rows = True
            if not any(unit.key in other.uses for other in units if other is not unit):
                unit.role = BlockRole.TABLE


def _modules_to_call(module: nn.Module, path: str, by_submodule: TakenApart) -> Iterator[tuple[BlockKey, nn.Module, BlockRole]]:
    """The modules that are onloaded, below an ancestor of blocks."""
    repeated = _is_repeated_list(module)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if repeated:
            yield from _block(child, child_path, by_submodule)
        elif _holds_repeated_list(child):
            yield from _modules_to_call(child, child_path, by_submodule)
        else:
            yield from _leaves(child, child_path, by_submodule)


def _block(block: nn.Module, path: str, by_submodule: TakenApart) -> Iterator[tuple[BlockKey, nn.Module, BlockRole]]:
    if isinstance(block, _CONTAINERS):
        yield from _modules_to_call(block, path, by_submodule)
    elif path in by_submodule.keys:
        for name, child in block.named_children():
            yield from _leaves(child, f"{path}.{name}", by_submodule, BlockRole.LAYER)
    elif _has_parameters(block):
        yield path, block, BlockRole.LAYER


def _leaves(
    module: nn.Module, path: str, by_submodule: TakenApart, role: BlockRole = BlockRole.OTHER
) -> Iterator[tuple[BlockKey, nn.Module, BlockRole]]:
    """A module with parameters of its own is called as a whole: it may read its children's without calling them."""
    own = any(True for _ in module.parameters(recurse=False)) or path in by_submodule.whole
    if own and path not in by_submodule.keys:
        yield path, module, role
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{path}.{name}", by_submodule, role)


def divisible_modules(unit: Unit) -> list[tuple[str, nn.Linear]]:
    """The plain linear modules inside of the unit, with the names of their weights, which it owns and uses once."""
    owned = {id(value): name for name, value in unit.parameters.items()}
    holders: dict[str, list[nn.Module]] = {}
    for module in unit.module.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in owned:
                holders.setdefault(owned[id(parameter)], []).append(module)
    return [
        (name, modules[0])
        for name, modules in holders.items()
        if len(modules) == 1 and type(modules[0]) is nn.Linear and unit.parameters[name] is modules[0].weight
        if len(modules[0].weight) >= _LEAST_ROWS
    ]


@dataclass(frozen=True, slots=True)
class StoredSize:
    """What a block takes.

    Attributes:
        slot_bytes: in the slots, while it comes.
        stored_bytes: in files.
        codec: what it is encoded with there; `none` for plain tensors.
        decode_seconds: of making plain tensors of it, once.
        encoded_bytes: of CPU memory, in its stored form; 0 for plain tensors.
    """

    slot_bytes: int
    stored_bytes: int
    codec: str = "none"
    decode_seconds: float = 0.0
    encoded_bytes: int = 0


def estimated_size(unit: Unit) -> StoredSize:
    """What a block takes, at most, while it is not known where its tensors lie in files.

    Whole units are read around a tensor: at most one more at either end.
    """
    slot_bytes = unit.block.packed_bytes + 2 * BLOCK_ALIGNMENT_BYTES * len(unit.parameters)
    return StoredSize(slot_bytes, unit.block.nbytes)


def has_submodules(unit: Unit) -> bool:
    """True if the unit consists of smaller modules that can be streamed by themselves."""
    return not isinstance(unit.module, _READ_AT_ONCE) and any(_has_parameters(child) for child in unit.module.children())


def _is_repeated_list(module: nn.Module) -> bool:
    """A list of at least two modules with parameters, two of which are of one class."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return False
    kinds = [type(child) for child in module.children() if _has_parameters(child)]
    return len(kinds) > len(set(kinds))


def _holds_repeated_list(module: nn.Module) -> bool:
    return any(_is_repeated_list(child) for child in module.modules())


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
