"""What stands in for the parameters of experts that are read one by one, until somebody wants all of them."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from offload.model.experts import ExpertPieces
from offload.storage.block_file import BlockFileWriter, spill_folder
from offload.storage.blocks import FileRange
from offload.storage.checkpoint import identity
from offload.storage.errors import CheckpointChanged


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN that holds no memory and cannot be written: whoever looks at it by mistake sees that."""
    value = math.nan if dtype.is_floating_point else 0
    return torch.full((1,), value, dtype=dtype).expand(shape)


def was_written_to(values: torch.Tensor) -> bool:
    """Whether it is a stand-in, and its only number another one than it was made with."""
    if not values.dim() or any(values.stride()):
        return False
    number = values.detach().as_strided((), ()).float()
    return not bool(number.isnan() if values.dtype.is_floating_point else number == 0)


class ExpertPlaceholders:
    """The parameters of one module of experts while they hold no values: who asks for them by `state_dict` gets them.

    They are written to a block file then, expert by expert, and the parameters are views of it from there on.

    Args:
        module: whose parameters are stand-ins.
        pieces: where their experts lie, by the parameters' names in the module.
        identities: of the files, by path.
        told: given a parameter that has its values now.
    """

    def __init__(
        self,
        module: nn.Module,
        pieces: Mapping[str, ExpertPieces],
        identities: Mapping[str, Any],
        warn: Callable[[nn.Parameter], None],
    ) -> None:
        self._module = module
        self._pieces = pieces
        self._warn = warn
        self._identities = identities
        self._filled = WeakSet[nn.Module]()
        self._hooks = [module.register_state_dict_pre_hook(lambda owner, *call: self.fill(owner))]

    def keep(self) -> None:
        """The session is over: the first call of the module fills them, too."""
        if self._hooks:
            self._hooks.append(self._module.register_forward_pre_hook(lambda owner, *call: self.fill(owner)))

    def fill(self, module: nn.Module) -> None:
        """Give the parameters their values.

        Args:
            module: the one that they stand in for, or a copy of it, which brings the hooks along.

        Raises:
            CheckpointChanged: if the files are not what they were.
            DiskFull: if there is no room for them.
        """
        if module in self._filled:
            return
        for path in paths_of(self._pieces.values()):
            if not os.path.exists(path) or identity(path) != self._identities[path]:
                raise CheckpointChanged(f"{path} was changed, and the model's experts are still to be read from it")
        writer = BlockFileWriter(spill_folder())
        parameters = {name: getattr(module, name) for name in self._pieces}
        try:
            for name, parameter in parameters.items():
                parts = (_read(pieces) for pieces in self._pieces[name])
                writer.add_parts(name, parameter.dtype, parameter.shape, parts)
            file = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        for name, parameter in parameters.items():
            parameter.data = file.view(name)
            self._warn(parameter)
        file.close()
        self._filled.add(module)
        while module is self._module and self._hooks:
            self._hooks.pop().remove()


def paths_of(pieces: Iterable[ExpertPieces]) -> set[str]:
    """The files that experts lie in."""
    return {piece.path for parts in pieces for part in parts for piece in part}


def _read(pieces: Sequence[FileRange]) -> torch.Tensor:
    content = bytearray()
    for piece in pieces:
        with open(piece.path, "rb") as file:
            file.seek(piece.offset)
            content += file.read(piece.nbytes)
    return torch.frombuffer(content, dtype=torch.uint8)
