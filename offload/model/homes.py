"""Where a parameter's values are while it is not on the device, and how it gets them back in the end."""

import os
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from offload.model.placeholders import is_placeholder
from offload.storage.blocks import FileRange
from offload.storage.errors import SessionError, TrainingError
from offload.storage.host_buffer import HostBuffer
from offload.storage.written_pages import written


@dataclass(frozen=True, slots=True)
class _Mapping:
    start: int
    end: int
    offset: int
    path: str
    inode: int


class FileMaps:
    """Tells which tensors are unmodified views of files, from the process's memory map as it is when it is first asked."""

    def __init__(self) -> None:
        self._files: dict[_Mapping, bool] = {}

    @cached_property
    def _mappings(self) -> list[_Mapping]:
        return sorted(_file_mappings(), key=lambda mapping: mapping.start)

    @cached_property
    def _starts(self) -> list[int]:
        return [mapping.start for mapping in self._mappings]

    def locate(self, tensor: torch.Tensor) -> FileRange | None:
        """The bytes of the file that `tensor` is a view of; None if it is ordinary memory, or was written to."""
        if tensor.device.type != "cpu" or not tensor.nbytes or not tensor.is_contiguous():
            return None
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        mapping = self._find(address, nbytes)
        if mapping is None or not self._is_file(mapping) or written([(address, address + nbytes)]) != [False]:
            return None
        return FileRange(mapping.path, address - mapping.start + mapping.offset, nbytes)

    def _is_file(self, mapping: _Mapping) -> bool:
        """False if the path leads to another file by now: then only the mapping still has the bytes."""
        if mapping not in self._files:
            try:
                self._files[mapping] = os.stat(mapping.path).st_ino == mapping.inode
            except OSError:
                self._files[mapping] = False
        return self._files[mapping]

    def _find(self, address: int, nbytes: int) -> _Mapping | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0 or self._mappings[index].end < address + nbytes:
            return None
        return self._mappings[index]


def _file_mappings() -> Iterable[_Mapping]:
    with open("/proc/self/maps") as file:
        for line in file:
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/") and not fields[5].endswith(" (deleted)"):
                start, end = (int(part, 16) for part in fields[0].split("-"))
                yield _Mapping(start, end, int(fields[2], 16), fields[5], int(fields[4]))


@dataclass(slots=True, eq=False)
class ParameterHome:
    """A parameter, and the CPU tensor that holds its values while it is not on the device.

    Attributes:
        tensor: a real tensor of the parameter's shape; `parameter.data` whenever it is not onloaded, unless the
            only copy is on the device: then it is that copy.
        original: what `parameter.data` becomes when the session ends; None if those bytes were given up, and the
            values are copied into new memory then.
        modified: True once the values differ from those that the block's source delivers.
        version: the parameter's version counter when it was last looked at.
        managed: the session's optimizer writes it, and says where; in the end it keeps the memory that it lies in then.
        shield: memory whose shielded side the tensor lies in; None for any other.
        device_rows: of a weight that the device and the CPU compute with together, the device's: the first ones. None for all.
    """

    name: str
    parameter: nn.Parameter
    tensor: torch.Tensor
    original: torch.Tensor | None
    modified: bool = False
    version: int = 0
    trained: bool = False
    shield: HostBuffer | None = None
    device_rows: int | None = None

    @property
    def device_part(self) -> torch.Tensor:
        """What goes to the device."""
        return self.tensor if self.device_rows is None else self.tensor[: self.device_rows]

    @property
    def host_part(self) -> torch.Tensor:
        """The rows of a divided weight, or of its bias, that the CPU computes with."""
        return self.tensor[self.device_rows :]

    def __post_init__(self) -> None:
        if self.parameter.is_inference():
            raise SessionError(
                f"{self.name} was made under torch.inference_mode(), so that torch does not count writes to it, which must be "
                "seen; make it outside of that mode (torch.no_grad() does)"
            )
        self.version = self.parameter._version

    def notice_changes(self) -> None:
        """See what the user did to the parameter since it was last onloaded: written in place, or given other data.

        Raises:
            SessionError: if it has another dtype or shape by now.
        """
        parameter, tensor = self.parameter, self.tensor
        if parameter.data_ptr() != tensor.data_ptr() or parameter.dtype != tensor.dtype:
            data = parameter.data
            if data.dtype != self.tensor.dtype or data.shape != self.tensor.shape or data.device.type != "cpu":
                raise SessionError(
                    f"{self.name} was {self.tensor.dtype}{list(self.tensor.shape)} and is {data.dtype}{list(data.shape)} on "
                    f"{data.device} now. Convert or move the model before offloading it, not inside the context."
                )
            self.tensor = data
            self.modified = True
        if parameter._version != self.version:
            self.version = parameter._version
            self.modified = True

    @property
    def is_aligned(self) -> bool:
        """Where torch puts tensors of its own: elsewhere kernels are slower, and some compute other bits."""
        return self.tensor.data_ptr() % 64 == 0

    @property
    def was_changed(self) -> bool:
        """Whether the user wrote to it since the values were last where they come from."""
        return self.modified or self.parameter._version != self.version

    def accept_changes(self) -> None:
        """The values that it has now are where they come from."""
        self.modified, self.version = False, self.parameter._version

    def expect_changes(self) -> None:
        """Have the values from now on, whatever writes them: fused optimizers leave no trace.

        Raises:
            TrainingError: if there are none.
        """
        self.check_trainable()
        self.leave_shield()
        self.modified = True

    def check_trainable(self) -> None:
        """Raise TrainingError for values that are decoded for each use: there is nothing to write to."""
        if is_placeholder(self.tensor):
            raise TrainingError(
                f"{self.name} is quantised and cannot be trained itself: freeze it (model.requires_grad_(False)) and train "
                "adapters"
            )

    def settle(self) -> None:
        """Stay where the parameter's values are now, until the end and after it."""
        self.tensor = self.original = self.parameter.data
        self.accept_changes()

    def leave_shield(self) -> None:
        """Live in the memory that the device copies from: it is trained, and each write would take a page more otherwise."""
        behind = None if self.shield is None else self.shield.behind(self.tensor)
        self.shield = None
        if behind is None:
            return
        begin = self.tensor.data_ptr()
        with torch.no_grad(), torch.inference_mode(False):
            if self.was_changed or written([(begin, begin + self.tensor.nbytes)]) != [False]:
                behind.copy_(self.tensor)
            if self.parameter.data_ptr() == begin:
                self.parameter.data = behind
        self.tensor = behind

    def bind(self, view: torch.Tensor, complete: bool = False) -> None:
        """Point the parameter into the slot.

        Args:
            complete: it holds what was changed, too.
        """
        if self.modified and not complete:
            view.copy_(self.device_part)
        self.parameter.data = view

    def unbind(self) -> None:
        """Point the parameter to its home again; what was written to it in the slot is kept."""
        if self.parameter._version != self.version:
            self.version = self.parameter._version
            self.keep(self.parameter.data)
            self.modified = True
        self.parameter.data = self.tensor

    def keep(self, values: torch.Tensor) -> None:
        """Have these values of the device's part from now on."""
        with torch.no_grad(), torch.inference_mode(False):
            if is_placeholder(self.tensor):
                self.tensor = torch.empty(self.tensor.shape, dtype=self.tensor.dtype)
            self.device_part.copy_(values)

    def restore(self) -> None:
        """The session ends: the parameter is as it was, with the values that it has now."""
        current = self.parameter.data
        if not self.trained or current.device.type != "cpu":
            with torch.no_grad(), torch.inference_mode(False):
                current = self.parameter.data = self._restored(current)
        # Whoever still knows this home keeps no file and no memory alive that the parameter has left.
        self.tensor, self.original, self.shield = current, None, None

    def _restored(self, current: torch.Tensor) -> torch.Tensor:
        if self.original is None:
            return current.to("cpu", copy=True)
        if is_placeholder(self.original):
            return current.to("cpu", copy=True) if self.was_changed else self.original
        if current is not self.original and current.data_ptr() != self.original.data_ptr():
            if self.modified or self.parameter._version != self.version:
                self.original.copy_(current)
            return self.original
        return current
