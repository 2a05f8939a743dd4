"""What became of single experts in a session."""

from dataclasses import asdict, dataclass
from typing import Any

from offload.moe.component import ExpertPart
from offload.scheduler.plan import Plan


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """Of one layer; each expert counts once a pass.

    Attributes:
        choices: experts asked for.
        hits: of them, those that were in device memory, or on their way.
        copies: brought when they were asked for.
        copied_bytes: theirs.
        computed_on_cpu: computed where they were instead.
    """

    layer: str
    choices: int
    hits: int
    copies: int
    copied_bytes: int
    computed_on_cpu: int = 0


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """Of all layers.

    Attributes:
        policy: what decided which experts stay.
        slots: experts that device memory has room for.
        experts: of the model.
        compared: over the first visits of the run, hits beside those of an all-knowing cache (Belady): `choices`, `hits`,
            `best_hits`; `whole_run` where these were all.
        prefetches: experts brought because the next layer's router, asked early, named them; `prefetches_used` of them were
            asked for.
        recall, recall_twice: of what was asked for, the share that was predicted, by as many guesses and by twice as many.
    """

    policy: str
    misses: str
    slots: int
    slot_bytes: int
    experts: int
    layers: list[LayerExperts]
    compared: dict[str, int]
    prefetches: int = 0
    prefetches_used: int = 0
    recall: float | None = None
    recall_twice: float | None = None

    @property
    def choices(self) -> int:
        return sum(layer.choices for layer in self.layers)

    @property
    def hits(self) -> int:
        return sum(layer.hits for layer in self.layers)

    @property
    def copies(self) -> int:
        return sum(layer.copies for layer in self.layers)

    @property
    def copied_bytes(self) -> int:
        return sum(layer.copied_bytes for layer in self.layers)

    @property
    def computed_on_cpu(self) -> int:
        return sum(layer.computed_on_cpu for layer in self.layers)

    @classmethod
    def of(cls, part: ExpertPart, plan: Plan) -> "ExpertUse":
        """So far."""
        tally, accuracy = part.tally, part.tally.accuracy
        layers = [
            LayerExperts(unit.key, layer.choices, layer.hits, layer.copies, layer.copied_bytes, layer.computed_on_cpu)
            for unit, layer in zip(part.units, tally.layers, strict=True)
        ]
        return cls(
            policy=part.policy,
            misses=part.misses,
            slots=plan.expert_slots,
            slot_bytes=plan.expert_slot_bytes,
            experts=part.spec.total,
            layers=layers,
            compared=asdict(part.record.bound(plan.expert_slots, part.minimum(plan))),
            prefetches=tally.prefetches,
            prefetches_used=tally.prefetches_used,
            recall=accuracy.found / accuracy.asked if accuracy.asked else None,
            recall_twice=accuracy.found_twice / accuracy.asked if accuracy.asked else None,
        )

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "ExpertUse":
        """The other way round of `asdict`."""
        return cls(**(content | {"layers": [LayerExperts(**layer) for layer in content["layers"]]}))

    def sentences(self) -> list[str]:
        """The gist, for a terminal and a page."""
        asked = max(1, self.choices)
        said = [
            f"experts: {self.slots:,} of {self.experts:,} in device memory, kept by {self.policy}; {self.hits / asked:.1%} of "
            f"{self.choices:,} were there, {self.copies:,} brought ({self.copied_bytes / 1e9:.2f} GB), "
            f"{self.computed_on_cpu:,} computed on the CPU"
        ]
        if self.compared["choices"]:
            part = "" if self.compared["whole_run"] else " in the first part of the run"
            ours, best = (self.compared[name] / self.compared["choices"] for name in ("hits", "best_hits"))
            said.append(f"an all-knowing cache would have had {best:.1%}, where this one had {ours:.1%}{part}")
        if self.recall is not None and self.recall_twice is not None:
            said.append(
                f"the next layer's router, asked early, named {self.recall:.0%} of what was asked for "
                f"({self.recall_twice:.0%} by twice as many names); of {self.prefetches:,} experts brought for that, "
                f"{self.prefetches_used:,} were used"
            )
        return said
