"""What is trained: the parameters that require a gradient, as they were at one moment."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from offload.storage.errors import SessionError
from offload.training.backward.gradients import gradient_bytes
from offload.training.beside import STEP_THEM


@dataclass(frozen=True, slots=True)
class TrainableSet:
    """The parameters that one version of the optimizer's state is laid out for.

    Attributes:
        version: counts the sets of one training; states, gradients and checkpoints belong to one of them.
    """

    parameters: tuple[nn.Parameter, ...]
    version: int = 0

    @classmethod
    def of(cls, model: nn.Module, version: int = 0) -> "TrainableSet":
        """Take what requires a gradient now.

        Raises:
            SessionError: if nothing does.
        """
        parameters = tuple(value for value in model.parameters() if value.requires_grad)
        if not parameters:
            raise SessionError(
                "nothing is to be trained: no parameter of the model requires a gradient. If parameters beside it do (prompts "
                f"of a wrapper, a value head), {STEP_THEM}"
            )
        return cls(parameters, version)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.parameters)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the same parameters require a gradient now."""
        return {id(value) for value in model.parameters() if value.requires_grad} == {id(value) for value in self.parameters}

    @property
    def elements(self) -> int:
        return sum(value.numel() for value in self.parameters)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.parameters)

    def gradient_bytes(self, masters: torch.dtype | None) -> int:
        """Bytes of all gradients, in the dtypes that they accumulate in."""
        return gradient_bytes(self.parameters, masters)
