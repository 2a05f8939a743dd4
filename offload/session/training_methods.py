"""What a session that trains offers beside the model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from offload.report.training import TrainingEstimate
from offload.storage.errors import SessionError

if TYPE_CHECKING:
    from offload.session.opened import Opened
    from offload.training.component import TrainingComponent


class TrainingMethods:
    """The methods of `Session` for training."""

    _opened: "Opened | None"
    _inside: bool

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all parameters that require a gradient when it is first asked for; torch's schedulers take it.

        With `training=Training(...)` it is there from the first forward pass on; with `training=True` it has to be asked for
        before the first backward, since it adds gradients up in its own way.

        Raises:
            SessionError: in a session without `training`, or if nothing requires a gradient, or some have one already.
            BudgetExceeded: if there is no room for gradients and states.
        """
        return self._training()[0].optimize().optimizer

    def backward(self, losses: Sequence[Callable[[], torch.Tensor]], layer_major: bool = True) -> list[float]:
        """Run forward and backward of several micro-batches, whose gradients add up.

        Args:
            losses: each computes the loss of one micro-batch with `session.model` when it is called, times its share of the
                step's items (`token_shares`), so that they add up to the mean over all.
            layer_major: load the weights once per step instead of once per micro-batch. Nothing else changes, not a bit;
                what layers pass on is held for all micro-batches at once. Random numbers are each micro-batch's own: seed
                them in the call if they are to be the same in either order.

        Returns:
            The losses.

        Example:
            ::

                with offload("org/model", training=Training()) as session:
                    shares = token_shares([batch["labels"] for batch in batches])
                    session.backward(
                        [lambda b=batch, s=share: session.model(**b).loss * s for batch, share in zip(batches, shares)]
                    )
                    session.step(max_grad_norm=1.0)
        """
        training, opened = self._training()
        return training.run(losses, layer_major, opened.root)

    def training_estimate(self, micro_batches: int = 1, layer_major: bool = True) -> TrainingEstimate:
        """Say where everything that is trained lives, what a step writes to disk, and how long it is predicted to take.

        Args:
            micro_batches: whose gradients a step adds up.
            layer_major: as in `backward`.
        """
        from offload.training.estimate import estimate_training

        training, opened = self._training()
        plan, spec, workload = opened.residency.plan, opened.residency.spec, opened.given.workload
        predictor = opened.prepared.predictor
        return estimate_training(training.optimize(), opened.model, plan, spec, workload, predictor, micro_batches, layer_major)

    def save(self, folder: str | Path, progress: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of what is trained, to resume from, in place of the folder's last one.

        States in CPU memory are written while training goes on; `step` waits for what it is about to change. A checkpoint is
        whole, or the last one stays.

        Args:
            progress: what `resume` gives back, in JSON's terms.

        Raises:
            DiskFull: if there is no room.
        """
        training, opened = self._training()
        training.save(folder, progress or {}, opened.sources)

    def resume(self, folder: str | Path) -> dict[str, Any] | None:
        """Take training up where a checkpoint left it, before the first step.

        Returns:
            The progress that it was saved with; None if the folder has no checkpoint.

        Raises:
            CorruptCheckpoint: if it is not whole.
            ConfigError: if it is of another model or optimizer.
        """
        training, opened = self._training()
        return training.resume(folder, opened.sources)

    def step(self, max_grad_norm: float | None = None, overlap: bool = False) -> float:
        """Clip the gradients, update what is trained, and forget the gradients.

        Args:
            max_grad_norm: of all gradients together; None to leave them as they are.
            overlap: return at once; a block is updated when the next forward comes to it, and states are read and written
                meanwhile. The same values, but the model's weights are not to be looked at before the next forward, `save`,
                or `finish`.

        Returns:
            The norm before.

        Raises:
            TrainingError: if it is no number; nothing was changed.
        """
        return self._training()[0].optimize().step(max_grad_norm, overlap)

    def finish(self) -> None:
        """Update what `step(overlap=True)` left to be updated."""
        self._training()[0].optimize().finish()

    def _training(self) -> "tuple[TrainingComponent, Opened]":
        from offload.training.component import TrainingComponent

        training = None if self._opened is None or not self._inside else self._opened.component(TrainingComponent)
        if training is None or self._opened is None:
            raise SessionError("the session does not train: give offload(..., training=True), and enter it")
        return training, self._opened
