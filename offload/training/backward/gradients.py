"""Gradients in CPU memory: added up as they are made, and each parameter's `grad` a view of them.

They have the dtype of what the optimizer steps, so that nothing is rounded on the way. A weight that is used in several
places (a tied head) has an accumulator for each, and `grad` is their sum: so the order of adding does not depend
on the order in which micro-batches run through the model.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload.runtime.machine import Machine
from offload.runtime.module_wrappers import Forward, ForwardWrap
from offload.storage.blocks import BlockKey, align_up
from offload.storage.host_buffer import HostBuffer
from offload.training.backward.gradient_transfer import GradientTransfer, ring_bytes

Named = tuple[str, nn.Parameter]


@dataclass(eq=False)
class _Accumulated:
    """One parameter's gradient so far.

    Attributes:
        view: in CPU memory; what `parameter.grad` is.
        others: of a tied weight, one for each further use; `first` is the first use's then, and `view` their sum.
        hidden: `parameter.grad` is kept from autograd for the moment.
    """

    parameter: nn.Parameter
    view: torch.Tensor
    first: torch.Tensor
    others: list["_FurtherUse"] = field(default_factory=list)
    hidden: bool = False
    filled: bool = False
    version: int = 0


@dataclass(eq=False)
class _FurtherUse:
    tensor: torch.Tensor
    filled: bool = False


class HostGradients:
    """Takes what backward makes.

    Args:
        dtype: that gradients are added up in where it is finer; None for the parameter's own.
    """

    def __init__(self, machine: Machine, dtype: torch.dtype | None = None) -> None:
        self.nbytes = 0
        self._discrete = machine if machine.discrete else None
        """The machine, where autograd must not add to what lies in CPU memory."""
        self._transfer: GradientTransfer | None = None
        self._dtype = dtype
        self._collecting = False
        self._taken: dict[int, _Accumulated] = {}
        self._handles: list[Any] = []
        self._buffers: list[HostBuffer] = []

    def add(self, blocks: Mapping[BlockKey, Iterable[Named]], further_uses: "Iterable[TiedUse]" = ()) -> None:
        """Take the gradients of these parameters too, if they are not taken already.

        Args:
            blocks: the parameters of one share a piece of memory.
            further_uses: modules that use a parameter which another one used before, with the name it has there.
        """
        for parameters in blocks.values():
            new = [parameter for _, parameter in parameters if id(parameter) not in self._taken]
            if new:
                self._take_block(new)
        for use in further_uses:
            if id(use.parameter) in self._taken:
                self._add_use(self._taken[id(use.parameter)], use)

    def close(self) -> None:
        """Leave the parameters to autograd again, without gradients."""
        while self._handles:
            self._handles.pop().remove()
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None
        for taken in self._taken.values():
            taken.parameter.grad = None
            taken.parameter.grad_dtype = taken.parameter.dtype
        self._taken.clear()
        self._buffers.clear()

    def begin(self) -> None:
        """A backward pass begins."""
        if self._collecting:
            return
        self._collecting = True
        for taken in self._taken.values():
            if self._discrete is None and not taken.others:
                continue
            held = taken.parameter.grad
            if held is None:
                taken.filled = False
                for use in taken.others:
                    use.filled = False
            elif held.data_ptr() != taken.view.data_ptr() or held._version != taken.version:
                # The user wrote to it, or gave another one: that is what is added to.
                taken.first.copy_(held)
                taken.filled = True
                for use in taken.others:
                    use.filled = False
            taken.hidden = True
            taken.parameter.grad = None

    def end(self) -> None:
        """It is over: gradients are to be seen."""
        if not self._collecting:
            return
        self._collecting = False
        if self._transfer is not None:
            self._transfer.finish()
        for taken in self._taken.values():
            if taken.hidden:
                taken.hidden = False
                self._show(taken)

    def _take_block(self, parameters: list[nn.Parameter]) -> None:
        kinds = [gradient_dtype(parameter, self._dtype) for parameter in parameters]
        sizes = [align_up(value.numel() * kind.itemsize) for value, kind in zip(parameters, kinds, strict=True)]
        buffer = self._allocate(sum(sizes))
        offset = 0
        for parameter, kind, size in zip(parameters, kinds, sizes, strict=True):
            view = buffer.own_storage(offset, parameter.numel() * kind.itemsize).view(kind).view(parameter.shape)
            offset += size
            held, parameter.grad = parameter.grad, None
            parameter.grad_dtype = kind
            taken = self._taken[id(parameter)] = _Accumulated(parameter, view, view)
            if held is not None:
                parameter.grad = view.copy_(held)
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._arrived(taken)))

    def _allocate(self, nbytes: int) -> HostBuffer:
        buffer = HostBuffer(nbytes)
        self._buffers.append(buffer)
        self.nbytes += buffer.nbytes
        return buffer

    def _add_use(self, taken: _Accumulated, use: "TiedUse") -> None:
        if taken.first is taken.view:
            taken.first = self._like(taken.view)
        further = _FurtherUse(self._like(taken.view))
        taken.others.append(further)
        use.collect = self._further(further)
        self._handles.append(use)

    def _like(self, view: torch.Tensor) -> torch.Tensor:
        return self._allocate(view.nbytes).tensor[: view.nbytes].view(view.dtype).view(view.shape)

    def _arrived(self, taken: _Accumulated) -> Callable[[torch.Tensor], None]:
        def arrived(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                # torch calls this for undefined gradients too: a tied weight's further use sends none this way.
                return
            in_place = gradient.data_ptr() == taken.view.data_ptr()
            if taken.others and not self._collecting:
                # The first that is known of this backward pass: what was there before is not to be taken for it.
                parameter.grad = gradient if in_place else None
                self.begin_within_backward()
                if in_place:
                    return
            if taken.hidden:
                taken.filled = self._add(taken.first, gradient, taken.filled)
                parameter.grad = None
            elif not in_place:
                taken.view.copy_(gradient)
                parameter.grad = taken.view

        return arrived

    def _further(self, use: _FurtherUse) -> Callable[[torch.Tensor], None]:
        def collect(gradient: torch.Tensor) -> None:
            self.begin_within_backward()
            use.filled = self._add(use.tensor, gradient, use.filled)

        return collect

    def begin_within_backward(self) -> None:
        """As `begin`, and the end comes by itself."""
        if not self._collecting:
            self.begin()
            torch.autograd.Variable._execution_engine.queue_callback(self.end)

    def _show(self, taken: _Accumulated) -> None:
        filled = [use.tensor for use in taken.others if use.filled]
        if taken.filled:
            filled.insert(0, taken.first)
        if not filled:
            return
        if taken.others:
            taken.view.copy_(filled[0])
            for tensor in filled[1:]:
                taken.view.add_(tensor)
        taken.parameter.grad = taken.view
        taken.version = taken.view._version

    def _add(self, total: torch.Tensor, gradient: torch.Tensor, filled: bool) -> bool:
        if self._discrete is not None and gradient.layout is torch.strided:
            if self._transfer is None:
                self._transfer = GradientTransfer(self._discrete.device, self._discrete.host.memory, ring_bytes(self.nbytes))
            self._transfer.add(total, gradient, filled)
        elif filled:
            total.add_(gradient.to(total.device))
        else:
            total.copy_(gradient)
        return True


def gradient_dtype(parameter: torch.Tensor, masters: torch.dtype | None) -> torch.dtype:
    """The dtype gradients accumulate in: the wider of the parameter's and the master's."""
    return masters if masters is not None and masters.itemsize > parameter.dtype.itemsize else parameter.dtype


def gradient_bytes(parameters: Iterable[torch.Tensor], masters: torch.dtype | None) -> int:
    return sum(value.numel() * gradient_dtype(value, masters).itemsize for value in parameters)


class TiedUse:
    """A place where a parameter is used that another module uses too: its gradient can be told from the other's.

    Args:
        module, name: `module.<name>` is the parameter.
    """

    def __init__(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.collect: Callable[[torch.Tensor], None] | None = None
        self._module, self._name = module, name
        self._wrap = ForwardWrap(module, self._wrapped)

    def remove(self) -> None:
        """Its gradient goes where the parameter's goes."""
        self.collect = None

    def undo(self) -> None:
        self._wrap.undo()

    def _wrapped(self, forward: Forward) -> Forward:
        def with_own_gradient(*args: Any, **kwargs: Any) -> Any:
            if self.collect is None or not torch.is_grad_enabled() or not self.parameter.requires_grad:
                return forward(*args, **kwargs)
            held: dict[str, Any] = self._module._parameters
            held[self._name] = _OwnGradient.apply(self.parameter, self.collect)  # type: ignore[no-untyped-call]
            try:
                return forward(*args, **kwargs)
            finally:
                held[self._name] = self.parameter

        return with_own_gradient


class _OwnGradient(torch.autograd.Function):
    """The parameter, whose gradient goes elsewhere."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, collect: Callable[[torch.Tensor], None]) -> torch.Tensor:
        ctx.collect = collect
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.collect(gradients[0])
        return None, None


def tied_uses(model: nn.Module) -> list[TiedUse]:
    """The further uses of every parameter that several modules hold; a look-up of rows counts as the first."""
    uses: dict[int, list[tuple[nn.Module, str, nn.Parameter]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((module, name, parameter))
    several = [places for places in uses.values() if len(places) > 1]
    return [
        TiedUse(*place)
        for places in several
        for place in sorted(places, key=lambda place: not isinstance(place[0], nn.Embedding))[1:]
    ]
