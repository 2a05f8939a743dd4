"""The commands, and where each declares what it takes; a call imports only its own."""

import importlib
from dataclasses import dataclass

from offload.cli.option import Arguments


@dataclass(frozen=True)
class Command:
    """What the help says of a command, and the class of its arguments."""

    summary: str
    module: str
    kind: str

    def arguments(self) -> type[Arguments]:
        """The class, of which a request is an instance."""
        module = importlib.import_module(f"offload.cli.arguments.{self.module}")
        kind: type[Arguments] = getattr(module, self.kind)
        return kind


GROUPS = {
    "experts": "Look into routings of experts.",
    "native": "Decoders of quantised weights, compiled for this machine.",
}
"""Commands of two words, by the first."""

COMMANDS = {
    "generate": Command(
        "Generate text. Tokens go to stdout as they are made, the report to stderr.", "generate", "GenerateArguments"
    ),
    "finetune": Command(
        "Fine-tune a model while its weights are streamed: LoRA adapters (a PEFT folder), or all weights (a model's folder).",
        "finetune",
        "FinetuneArguments",
    ),
    "merge": Command("Fold an adapter into its model. Writes a folder that transformers loads.", "others", "MergeArguments"),
    "plan": Command(
        "Plan a run without loading the model: what lives where, how fast, what holds it back, what would help.",
        "plan",
        "PlanArguments",
    ),
    "probe": Command(
        "Measure this machine (a few seconds), for `plan` and for predictions. The profile is kept by hardware id.",
        "others",
        "ProbeArguments",
    ),
    "report": Command(
        "Show a run again that `generate --report FILE.json` wrote; given two, compare them.", "others", "ReportArguments"
    ),
    "synth": Command(
        "Write a checkpoint with random weights, sharded like real ones, with a tokenizer.", "others", "SynthArguments"
    ),
    "experts replay": Command(
        "Compare cache policies for experts on a recorded routing (from `generate --expert-trace`).",
        "others",
        "ReplayArguments",
    ),
    "native build": Command(
        "Compile the decoders, which are in C++: quantised weights are decoded two to ten times as fast from then on, to the "
        "same bits. Needs a C++ compiler.",
        "others",
        "BuildArguments",
    ),
}
