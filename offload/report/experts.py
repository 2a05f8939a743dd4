"""What became of single experts in a session."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from offload.report.schema import RENAMED
from offload.scheduler.renamed import Renamed


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """What became of one layer's experts; each counts once a pass.

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
class ExpertUse(Renamed):
    """What became of the experts of all layers.

    Attributes:
        policy: what decided which experts stay.
        slots: experts that device memory has room for.
        experts: of the model.
        belady: `choices` over the first visits of the run, the `hits` that Belady's offline-optimal policy would have had, and
            the `measured_hits`; `whole_run` where these visits were all.
        prefetches: experts brought because the next layer's router, asked early, named them; `prefetches_used` of them were
            asked for.
        recall, recall_at_2k: of what was asked for, the share that was predicted, by as many guesses and by twice as many.
    """

    RENAMED: ClassVar[Mapping[str, str]] = RENAMED["experts"]

    policy: str
    misses: str
    slots: int
    slot_bytes: int
    experts: int
    layers: list[LayerExperts]
    belady: dict[str, int]
    prefetches: int = 0
    prefetches_used: int = 0
    recall: float | None = None
    recall_at_2k: float | None = None

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
        if self.belady["choices"]:
            part = "" if self.belady["whole_run"] else " in the first part of the run"
            ours, best = (self.belady[name] / self.belady["choices"] for name in ("measured_hits", "hits"))
            said.append(f"an all-knowing cache would have had {best:.1%}, where this one had {ours:.1%}{part}")
        if self.recall is not None and self.recall_at_2k is not None:
            said.append(
                f"the next layer's router, asked early, named {self.recall:.0%} of what was asked for "
                f"({self.recall_at_2k:.0%} by twice as many names); of {self.prefetches:,} experts brought for that, "
                f"{self.prefetches_used:,} were used"
            )
        return said
