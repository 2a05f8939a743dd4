"""What was predicted beside what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from offload.scheduler.phases import DECODE, PREFILL, PhaseTimes
from offload.scheduler.prediction import Prediction, WhatIf


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the cost model says of what was asked, beside what was measured.

    Attributes:
        prefill_seconds, seconds_per_token: of the first prefill, and of a decode pass.
        errors: predicted over measured, less one; None where nothing was measured.
        bound: what holds decode back, by the prediction.
        what_if: changes, and how many times as fast a prompt with its answer would be.
        drift: what each link gave during the run over what it gave when the profile was made, less one.
        model_error: of a decode pass, predicted again with what the links gave: what is left is the cost model's own.
        hardware_id: of the profile that was predicted with.
        exact_work: False where the model's work was estimated from sizes.
    """

    prefill_seconds: float
    prefill_measured_seconds: float | None
    prefill_error: float | None
    seconds_per_token: float
    measured_seconds_per_token: float | None
    seconds_per_token_error: float | None
    decode_shares: dict[str, float]
    bound: str
    what_if: list[WhatIf]
    drift: dict[str, float]
    model_error: float | None
    hardware_id: str
    exact_work: bool

    @classmethod
    def of(
        cls,
        predicted: Prediction,
        undrifted: Prediction,
        drift: dict[str, float],
        what_if: list[WhatIf],
        phases: Mapping[str, PhaseTimes],
    ) -> "Comparison":
        prefill, decode = phases.get(PREFILL), phases.get(DECODE)
        first = prefill.first_seconds if prefill is not None and prefill.passes else None
        step = decode.seconds / decode.passes if decode is not None and decode.passes else None
        return cls(
            prefill_seconds=predicted.prefill_seconds,
            prefill_measured_seconds=first,
            prefill_error=_error(predicted.prefill_seconds, first),
            seconds_per_token=predicted.seconds_per_token,
            measured_seconds_per_token=step,
            seconds_per_token_error=_error(predicted.seconds_per_token, step),
            decode_shares=predicted.decode_shares,
            bound=predicted.bound,
            what_if=what_if,
            drift=drift,
            model_error=_error(undrifted.seconds_per_token, step),
            hardware_id=predicted.hardware_id,
            exact_work=predicted.exact_work,
        )


def _error(predicted: float, measured: float | None) -> float | None:
    return predicted / measured - 1 if measured else None
