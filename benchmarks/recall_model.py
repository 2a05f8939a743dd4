"""A small model that learns to recall facts, trained here: what shows whether a KV cache forgot.

Text is noise with structure (each token follows from the two before it, mostly); in it are facts, one token each, that tie a
value to a key, and questions, a token that names a key, answered by the next token. Perplexity is nearly blind to what a cache
loses; answers are not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

KEYS, VALUES, FILLER = 12, 12, 48
FACTS_AT = FILLER
ASKS_AT = FACTS_AT + KEYS * VALUES
ANSWERS_AT = ASKS_AT + KEYS
VOCAB = ANSWERS_AT + VALUES


@dataclass(frozen=True, slots=True)
class Texts:
    """Some texts.

    Attributes:
        tokens: int64 [texts, length].
        asked_at: bool [texts, length]: the token names a key, and the next one answers.
        first_asked_late: of these, questions in the last quarter of the text about a fact of the first quarter, that was not
            asked before.
    """

    tokens: torch.Tensor
    asked_at: torch.Tensor
    first_asked_late: torch.Tensor


class Noise:
    """Filler in which the two tokens before tell the next one, but for one time in four."""

    def __init__(self, seed: int = 7) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._next = torch.randint(0, FILLER, (FILLER, FILLER), generator=generator)

    def of(self, texts: int, length: int, generator: torch.Generator) -> torch.Tensor:
        tokens = torch.randint(0, FILLER, (texts, length), generator=generator)
        free = torch.rand(texts, length, generator=generator) < 0.25
        for place in range(2, length):
            told = self._next[tokens[:, place - 2], tokens[:, place - 1]]
            tokens[:, place] = torch.where(free[:, place], tokens[:, place], told)
        return tokens


def texts(count: int, length: int, seed: int, noise: Noise) -> Texts:
    """Texts with a fact for every key, half of them early, and questions about half of the keys at any time after."""
    generator = torch.Generator().manual_seed(seed)
    tokens = noise.of(count, length, generator)
    asked_at = torch.zeros(count, length, dtype=torch.bool)
    late = torch.zeros(count, length, dtype=torch.bool)
    quarter = length // 4
    for row in range(count):
        keys = torch.randperm(KEYS, generator=generator).tolist()
        facts = (1 + torch.randperm(quarter - 1, generator=generator)[:KEYS]).tolist()
        taken = set(facts)
        value = {}
        for key, place in zip(keys, facts, strict=True):
            value[key] = int(torch.randint(0, VALUES, (1,), generator=generator))
            tokens[row, place] = FACTS_AT + key * VALUES + value[key]
        asked: set[int] = set()
        places = torch.randperm(length - quarter - 1, generator=generator)[: length // 8] + quarter
        for place in sorted(places.tolist()):
            if place in taken or place + 1 in taken:
                continue
            is_late = place >= length - quarter
            # Half of the keys are not asked for before the last quarter.
            pool = keys if is_late else keys[: KEYS // 2]
            key = pool[int(torch.randint(0, len(pool), (1,), generator=generator))]
            tokens[row, place], tokens[row, place + 1] = ASKS_AT + key, ANSWERS_AT + value[key]
            taken |= {place, place + 1}
            asked_at[row, place] = True
            late[row, place] = is_late and key not in asked
            asked.add(key)
    return Texts(tokens, asked_at, late)


def make(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=128**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: nn.Module, noise: Noise, say: Callable[[str], None], most_seconds: float = 400.0) -> float:
    """Longer and longer texts, until answers are right; the share of right answers in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    begun, step, recall = time.perf_counter(), 0, 0.0
    for length, wanted in ((64, 0.95), (128, 0.97), (256, 0.995)):
        recall = 0.0
        while recall < wanted and time.perf_counter() - begun < most_seconds:
            batch = texts(32, length, 1000 + step, noise)
            logits = model(input_ids=batch.tokens).logits[:, :-1]
            targets = batch.tokens[:, 1:]
            losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            # Answers are few, and what is to be learned.
            weights = 0.2 + batch.asked_at[:, :-1] * 2.0
            loss = (losses * weights).sum() / weights.sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            right = (logits.argmax(-1) == targets)[batch.asked_at[:, :-1]].float().mean().item()
            recall = 0.95 * recall + 0.05 * right
            step += 1
            if step % 50 == 0:
                spent = time.perf_counter() - begun
                say(f"{length} tokens, step {step}: loss {loss.item():.3f}, answers {recall:.3f}, {spent:.0f} s")
    return recall


def trained(folder: str | None, say: Callable[[str], None]) -> tuple[LlamaForCausalLM, Noise]:
    """The model, from `folder` if it was kept there, else trained now, and kept."""
    noise = Noise()
    kept = None if folder is None else Path(folder)
    if kept is not None and (kept / "config.json").exists():
        return LlamaForCausalLM.from_pretrained(kept).eval(), noise
    model = make()
    train(model, noise, say)
    if kept is not None:
        model.save_pretrained(kept)
    return model.eval(), noise
