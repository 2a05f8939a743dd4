"""A causal model's loss without all of its logits: computed a few tokens at a time, with the gradients, in one go.

Logits of a long sequence over a large vocabulary are the largest tensor of a training step, and held several times over.
Here a chunk's logits give its loss and, at once, what backward needs of them: the gradient of the hidden states and of the
head's weight, so that the head is neither kept nor brought again (as the fused kernels of Liger do, arXiv 2410.10989). Sums
are in another order than in one product: of level *rounding*.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from offload.runtime.module_wrappers import Forward, ForwardWrap
from offload.storage.errors import ConfigError, SessionError
from offload.training.weighting import IGNORED


class _Call(threading.local):
    """One call of the model: micro-batches that go through it layer by layer have a thread each."""

    active = False
    hidden: torch.Tensor | None = None
    """What the head gave."""
    given = False
    """The loss was asked for, of what the head gave."""


class ChunkedLoss:
    """Takes over the head and the loss of a model whose forward is given labels, until undone.

    Args:
        tokens: whose logits are there at once.
        backward_begins: called when backward reaches the loss, before any gradient leaves it.

    Raises:
        ConfigError: if the head is no plain linear layer, or the loss not transformers' own for causal models.
    """

    def __init__(self, model: nn.Module, tokens: int, backward_begins: Callable[[], None]) -> None:
        given: Any = model
        head = given.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if type(head) is not nn.Linear or getattr(model, "loss_function", None) is not ForCausalLMLoss:
            raise ConfigError(
                f"loss_chunk={tokens} needs a causal language model with a plain linear head and transformers' own loss; "
                f"{type(model).__name__} has another. Leave it out"
            )
        self._model: Any = model
        self._head = head
        self._tokens = tokens
        self._backward_begins = backward_begins
        self._call = _Call()
        self._wraps = [ForwardWrap(head, self._in_head), ForwardWrap(model, self._in_model)]
        model.loss_function = self._loss  # type: ignore[assignment]

    def undo(self) -> None:
        while self._wraps:
            self._wraps.pop().undo()
        del self._model._loss_function

    def _in_model(self, forward: Forward) -> Forward:
        def with_loss(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("labels") is None:
                return forward(*args, **kwargs)
            self._call.active, self._call.given = True, False
            try:
                output = forward(*args, **kwargs)
            except (RuntimeError, IndexError, ValueError) as error:
                if self._call.hidden is not None and not self._call.given:
                    raise self._refusal() from error
                raise
            finally:
                self._call.active, self._call.hidden = False, None
            if not self._call.given:
                raise self._refusal()
            # They were never there.
            output.logits = None
            return output

        return with_loss

    def _in_head(self, forward: Forward) -> Forward:
        def hidden_or_loss(hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
            if targets is not None:
                loss: torch.Tensor = _LossOfChunks.apply(  # type: ignore[no-untyped-call]
                    hidden, self._head.weight, self._head.bias, targets, self._tokens, self._backward_begins
                )
                return loss
            if not self._call.active:
                result: torch.Tensor = forward(hidden)
                return result
            # Instead of logits: a tensor of its own, to be known by.
            self._call.hidden = hidden.view_as(hidden)
            return self._call.hidden

        return hidden_or_loss

    def _refusal(self) -> SessionError:
        return SessionError(
            f"{type(self._model).__name__} changes its logits after the head, or computes its loss in a way of its own, which "
            "a loss in chunks would leave out; leave out loss_chunk"
        )

    def _loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORED,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As transformers' ForCausalLMLoss, of hidden states."""
        if logits is not self._call.hidden:
            raise self._refusal()
        self._call.given = True
        if shift_labels is None:
            assert labels is not None
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        targets = torch.where(targets == ignore_index, IGNORED, targets)
        total: torch.Tensor = self._head(logits.reshape(-1, logits.shape[-1]), targets)
        count = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return total / count


class _LossOfChunks(torch.autograd.Function):
    """The sum of the tokens' losses; its gradients are made in forward, while the weight is there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        tokens: int,
        backward_begins: Callable[[], None],
    ) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for begin in range(0, len(hidden), tokens):
            rows, goal = hidden[begin : begin + tokens], targets[begin : begin + tokens]
            logits = nn.functional.linear(rows, weight, bias).float()
            total += nn.functional.cross_entropy(logits, goal, ignore_index=IGNORED, reduction="sum")
            if of_hidden is None and of_weight is None and of_bias is None:
                continue
            of_logits = _gradient_of_logits(logits, goal).to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[begin : begin + tokens])
            if of_weight is not None:
                of_weight += of_logits.t() @ rows
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        # Not `save_for_backward`: what is saved there of a streamed block would be computed again.
        ctx.gradients = of_hidden, of_weight, of_bias
        ctx.dtype = weight.dtype
        ctx.backward_begins = backward_begins
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        # Nothing was saved that backward would ask for first, so nothing else says that it begins.
        ctx.backward_begins()
        of_hidden, of_weight, of_bias = ctx.gradients
        scale = outer[0]
        return (
            None if of_hidden is None else (of_hidden * scale.float()).to(of_hidden.dtype),
            None if of_weight is None else (of_weight * scale).to(ctx.dtype),
            None if of_bias is None else (of_bias * scale).to(ctx.dtype),
            None,
            None,
            None,
        )


def _gradient_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Softmax less one at the target; zero where nothing is to be learned. Overwrites `logits`."""
    counted = targets != IGNORED
    gradient = torch.softmax(logits, -1, out=logits) if not logits.requires_grad else torch.softmax(logits, -1)
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    return gradient.mul_(counted[:, None])
