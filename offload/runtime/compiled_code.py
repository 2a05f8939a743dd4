"""torch.compile in a session: the code of a layer is compiled, and the window around it is not.

Whatever a user compiles (the model, a layer, a forward, before or inside of the session), torch evaluates Python frames
through a callback while it runs. A wrapper of a session takes the callback away for the time of its own work, and a layer's
own forward gets it back: a graph never contains a window, so that it is right for every slot.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame

from offload.storage.errors import SessionError

NOT_ACROSS = (
    "weights are streamed by the block, and a graph cannot hold the loads between blocks: leave fullgraph=True out, or give it "
    "for parts of a layer"
)

_RECOMPILATIONS = 64
"""Beside one for each layer: torch gives a function up after so many, which by default is less than most models' layers."""

_present = threading.local()


def outside_of_graphs(wrapper: type) -> type:
    """Class decorator: instances are called, and never compiled."""
    call: Any = vars(wrapper)["__call__"]
    # As the forward of a module torch looks at the instance, and where it is compiled by itself, at its call.
    marked: Any
    for marked in (wrapper, call):
        marked._torchdynamo_disable = True
        marked._torchdynamo_disable_msg = NOT_ACROSS
    _skip(call.__code__)
    return wrapper


def _skip(code: Any) -> None:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))


class Suspension:
    """While it is entered nothing is compiled; what is resumed inside of it is, as it would have been outside."""

    __slots__ = ("_before", "_callback")

    def __enter__(self) -> None:
        self._callback = set_eval_frame(None)
        self._before = getattr(_present, "callback", None)
        if self._callback is not None:
            _present.callback = self._callback

    def __exit__(self, *error: object) -> None:
        _present.callback = self._before
        if self._callback is not None:
            set_eval_frame(self._callback)


def whole_model(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the model's forward, which refuses to be one graph."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        if getattr(getattr(_present, "callback", None), "_one_graph", False):
            raise SessionError(NOT_ACROSS)
        return forward(*args, **kwargs)

    return checked


class CompiledLayers:
    """Runs layers' forwards by what the user compiled them with.

    Args:
        count: of layers, each of which may be compiled for itself.
        warn: told what becomes of it.
    """

    def __init__(self, count: int, warn: Callable[[str], None]) -> None:
        self.used = False
        self._count, self.warn = count, warn
        self._limit: int | None = None

    def wrap(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward as it runs inside of a `Suspension`."""
        plain = getattr(forward, "_torchdynamo_orig_callable", forward)
        """The forward itself, where the layer was replaced by what torch.compile made of it."""

        def resumed(*args: Any, **kwargs: Any) -> Any:
            callback = getattr(_present, "callback", None)
            if callback is None and plain is forward:
                return forward(*args, **kwargs)
            if torch.is_grad_enabled():
                self.warn("compiled code is not used while gradients are recorded: layers are computed again for backward")
                return plain(*args, **kwargs)
            self._begin()
            if callback is None:
                return forward(*args, **kwargs)
            set_eval_frame(callback)
            try:
                return forward(*args, **kwargs)
            finally:
                set_eval_frame(None)

        return resumed

    def leave_out(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the forward of a layer that is taken apart, which says that it is not compiled."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            if getattr(_present, "callback", None) is not None:
                self.warn(
                    "layers are streamed by their sub-modules in this budget, and are not compiled: torch.compile needs room "
                    "for a whole layer"
                )
            return forward(*args, **kwargs)

        return noted

    def undo(self) -> None:
        if self._limit is not None:
            _dynamo_config().recompile_limit = self._limit

    def _begin(self) -> None:
        if not self.used:
            self.used = True
            self.warn(
                "the model is compiled: its layers are, one by one, and what is around them is not; exactness is rounding, "
                "against the model without torch.compile"
            )
            config = _dynamo_config()
            self._limit = config.recompile_limit
            config.recompile_limit = max(config.recompile_limit, self._count + _RECOMPILATIONS)


def _dynamo_config() -> Any:
    import torch._dynamo.config

    return torch._dynamo.config
