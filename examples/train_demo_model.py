"""Train the small model that ships as `offload generate demo`.

A 7-layer Llama of 5.7 million parameters (11 MB in bfloat16) with a 2,048-entry byte-pair vocabulary, trained from
nothing on the King James Bible: a text whose copyright has expired, packaged by Debian as `bible-kjv-text`.

    apt-get install bible-kjv            # the text, and the program that prints it
    python examples/train_demo_model.py --output offload/demo --minutes 35
"""

import argparse
import math
import re
import subprocess
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT_TOKENS = 128
BATCH_SEQUENCES = 24


def read_text(path: Path | None) -> str:
    """The training text, one verse a line, without the "Ge1:1" labels."""
    raw = (
        path.read_text()
        if path
        else subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    )
    return "\n".join(re.sub(r"^\w+:\d+ ", "", line).strip() for line in raw.splitlines())


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=1024
    )


def make_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def batches(tokens: torch.Tensor):
    while True:
        starts = torch.randint(len(tokens) - CONTEXT_TOKENS - 1, (BATCH_SEQUENCES,))
        yield torch.stack([tokens[start : start + CONTEXT_TOKENS] for start in starts])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    rows = tokens[: len(tokens) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)[:64]
    return float(model(input_ids=rows, labels=rows).loss)


def learning_rate(done: float) -> float:
    """Warm up over the first 2% of the time, then a cosine down to a twentieth (`done` runs from 0 to 1)."""
    peak = 2e-3
    return peak * (min(1.0, done / 0.02) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))))


def train(model: LlamaForCausalLM, tokens: torch.Tensor, held_out: torch.Tensor, minutes: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    begun = time.monotonic()
    for step, rows in enumerate(batches(tokens)):
        done = (time.monotonic() - begun) / (60 * minutes)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = max(1e-5, learning_rate(done))
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 200 == 0:
            print(f"step {step} done {done:.1%} loss {loss:.3f} held-out {held_out_loss(model, held_out):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--text", type=Path, help="a text file to use instead of Debian's `bible` program")
    parser.add_argument("--minutes", type=float, default=35)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = read_text(arguments.text)
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    # The last 2% are never trained on.
    cut = int(len(tokens) * 0.98)
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens")
    train(model, tokens[:cut], tokens[cut:], arguments.minutes)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
