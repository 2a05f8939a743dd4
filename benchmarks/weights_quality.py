"""What `--weights` costs: perplexity, and how often the likeliest token stays, on two small models.

    python -m benchmarks.weights_quality [--model DIR] [--texts 64] [--length 256] [--output FILE.json]

- the demo (trained in bfloat16 on the King James Bible), on texts that the plain model itself samples, seeded: its
  perplexity there is what its own uncertainty leaves;
- a model that is trained first (a minute or two), or taken from DIR, on texts that it has not seen, and on questions about
  facts in them.

Both are toys, and small models feel few bits more than large ones: what it shows is an order.
"""

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkout import commit
from benchmarks.recall_model import texts, trained
from offload import offload
from offload.model.checkpoint_folder import find_folder
from offload.model.encoding import KINDS

_BATCH = 16


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one model with its weights in one form."""

    model: str
    weights: str
    perplexity: float
    agreement: float
    """Of the likeliest next token with the plain model's."""
    answers: float | None = None
    """The share of questions that are answered; None where there are none."""


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(part).logits.float() for part in tokens.split(_BATCH)])


def qualities(name: str, folder: str, tokens: torch.Tensor, asked: torch.Tensor | None) -> list[Quality]:
    """Args: asked: bool, where a token asks and the next one answers."""
    found, plain = [], None
    for kind in ("as-is", *KINDS):
        options = {"weights": kind, "weights_head": kind, "batch_size": _BATCH, "max_tokens": tokens.shape[1]}
        with offload(folder, device="cpu", cpu_memory="2GiB", **options) as session:
            logits = logits_of(session.model, tokens)
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        best = logits.argmax(-1)
        plain = best if plain is None else plain
        answered = None
        if asked is not None:
            at = asked[:, :-1]
            answered = (best[:, :-1][at] == tokens[:, 1:][at]).float().mean().item()
        found.append(Quality(name, kind, float(nll.exp()), (best == plain).float().mean().item(), answered))
    return found


def sampled(folder: str, count: int, length: int) -> torch.Tensor:
    """Texts by the plain model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    torch.manual_seed(0)
    begin = torch.randint(2, model.config.vocab_size, (count, 1))
    asked = {"do_sample": True, "max_new_tokens": length - 1, "min_new_tokens": length - 1, "pad_token_id": 0, "top_k": 0}
    return model.generate(begin, attention_mask=torch.ones_like(begin), **asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder for the trained model; made if need be (default: trained each time)")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--output")
    request = parser.parse_args()
    demo = find_folder("demo")
    found = qualities("demo", demo, sampled(demo, request.texts, request.length), None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = request.model or scratch
        _, noise = trained(folder, print)
        unseen = texts(request.texts, request.length, 7, noise)
        found += qualities("recall", folder, unseen.tokens, unseen.asked_at)
    print("| Model | Weights | Perplexity | Likeliest token stays | Questions answered |\n|---|---|---|---|---|")
    for item in found:
        answers = "" if item.answers is None else f"{item.answers:.1%}"
        print(f"| {item.model} | {item.weights} | {item.perplexity:.3f} | {item.agreement:.1%} | {answers} |")
    if request.output:
        Path(request.output).write_text(
            json.dumps({"commit": commit(), "qualities": [asdict(item) for item in found]}, indent=1)
        )


if __name__ == "__main__":
    main()
