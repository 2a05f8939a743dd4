"""What stands in for the values of parameters that are read piece by piece, until somebody wants all of them."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import nn

from offload.model.experts import ExpertPieces
from offload.storage.block_file import BlockFileWriter, spill_folder
from offload.storage.blocks import FileRange
from offload.storage.checkpoint import identity
from offload.storage.codecs.weights import EncodedTensor, parts_of
from offload.storage.errors import CheckpointChanged
from offload.storage.load_plan import decoded_pieces


def placeholder(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of NaN that holds no memory and cannot be written: whoever looks at it by mistake sees that."""
    value = math.nan if dtype.is_floating_point else 0
    return torch.full((1,), value, dtype=dtype).expand(shape)


def is_placeholder(values: torch.Tensor) -> bool:
    """Whether all its numbers are one number of memory."""
    return bool(values.dim()) and values.numel() > 1 and not any(values.stride())


def has_no_values(values: torch.Tensor) -> bool:
    """Whether it is a stand-in, or a copy of one, which has memory of its own."""
    if is_placeholder(values):
        return True
    return bool(values.numel()) and bool(values.reshape(-1)[0].isnan()) and bool(values.isnan().all())


def was_written_to(values: torch.Tensor) -> bool:
    """Whether it is a stand-in, and its only number another one than it was made with."""
    if not values.dim() or any(values.stride()):
        return False
    number = values.detach().as_strided((), ()).float()
    return not bool(number.isnan() if values.dtype.is_floating_point else number == 0)


class Values(Protocol):
    """Where the values of one parameter are."""

    @property
    def paths(self) -> set[str]:
        """The files."""
        ...

    def parts(self) -> Iterator[torch.Tensor]:
        """Return them piece by piece, of the first dimension."""
        ...


class ExpertValues:
    """Those of experts that lie in files as they are."""

    def __init__(self, pieces: ExpertPieces) -> None:
        self._pieces = pieces

    @property
    def paths(self) -> set[str]:
        return paths_of([self._pieces])

    def parts(self) -> Iterator[torch.Tensor]:
        return (_read(pieces) for pieces in self._pieces)


class EncodedValues:
    """Those that are decoded."""

    def __init__(self, source: EncodedTensor) -> None:
        self._source = source

    @property
    def paths(self) -> set[str]:
        return {part.path for part in self._source.parts}

    def parts(self) -> Iterator[torch.Tensor]:
        return decoded_pieces(self._source, [_read([part]) for part in parts_of(self._source)])


class Placeholders:
    """Some parameters of one module while they hold no values: who asks for them by `state_dict` gets them.

    They are written to a block file then, piece by piece, and the parameters are views of it from there on.

    Args:
        module: whose parameters they are.
        values: where these are, by the parameters' names in the module.
        on_filled: given a parameter that has its values now.
    """

    def __init__(self, module: nn.Module, values: Mapping[str, Values], on_filled: Callable[[nn.Parameter], None]) -> None:
        self._module = module
        self._values = values
        self._on_filled = on_filled
        self._dtypes = {name: getattr(module, name).dtype for name in values}
        self._identities = {path: identity(path) for path in {path for item in values.values() for path in item.paths}}
        self._filled = WeakSet[nn.Module]()
        self._hooks = [module.register_state_dict_pre_hook(self._before)]

    def keep(self) -> None:
        """The session is over: the first call of the module fills them, too."""
        if self._hooks:
            self._hooks.append(self._module.register_forward_pre_hook(self._before))

    def __getstate__(self) -> dict[str, Any]:
        """Where the values are goes with a pickled module; what the session did with them is left behind."""
        return {**vars(self), "_filled": None, "_on_filled": _nothing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _filled=WeakSet[nn.Module]())

    def _before(self, owner: nn.Module, *call: Any) -> None:
        self.fill(owner)

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
        # Others have their values: resident ones, and those that somebody wrote to.
        parameters = {name: value for name in self._values if has_no_values((value := getattr(module, name)).data)}
        if parameters:
            self._fill(parameters)
        if len(parameters) == len(self._values):
            self._filled.add(module)
            while module is self._module and self._hooks:
                self._hooks.pop().remove()

    def _fill(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for path, known in self._identities.items():
            if not os.path.exists(path) or identity(path) != known:
                raise CheckpointChanged(f"{path} was changed, and weights of the model are still to be read from it")
        writer = BlockFileWriter(spill_folder())
        try:
            for name, parameter in parameters.items():
                writer.add_parts(name, self._dtypes[name], parameter.shape, self._values[name].parts())
            file = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        for name, parameter in parameters.items():
            # The model may have been moved, or given another dtype, since.
            parameter.data = file.view(name).to(parameter.device, parameter.dtype)
            self._on_filled(parameter)
        file.close()


def _nothing(parameter: nn.Parameter) -> None:
    """Nobody is to be told."""


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
