"""How the next token is chosen: what was asked for, and else what the model's own generation config says."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from offload.storage.errors import CheckpointError, ConfigError, foreign_file

_SHARES = ("top_k", "top_p", "min_p")
"""What narrows a draw."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. What is None is as the model's generation config says, or else left out.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k: draw from so many of the likeliest tokens; 0 for all.
        top_p: draw from the likeliest tokens whose probabilities add up to this.
        min_p: draw from tokens that are at least so many times as likely as the likeliest.
        repetition_penalty: scores of tokens that came before are divided by it.
        num_beams: sequences that are followed at once for each prompt; 1 for no search.
        stop: texts; the answer ends before the first of them.
        seed: of the draw; None for another one each time.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_beams: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        _check("temperature", self.temperature, 0, float("inf"), "0 or a positive number")
        _check("top_k", self.top_k, 0, float("inf"), "at least 0")
        _check("top_p", self.top_p, 1e-12, 1, "more than 0 and at most 1")
        _check("min_p", self.min_p, 0, 1, "from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, 1e-12, float("inf"), "a positive number")
        _check("num_beams", self.num_beams, 1, float("inf"), "at least 1")
        _check("seed", self.seed, 0, (1 << 63) - 1, "at least 0 and below 2^63")
        if any(not text for text in self.stop):
            raise ConfigError("stop='' would stop at once: give some text")

    def following(self, config: GenerationConfig) -> "Sampling":
        """The same, with what `config` says where nothing was asked for; all is decided then.

        Raises:
            ConfigError: for a way to draw where none is drawn.
        """
        temperature = self.temperature
        if temperature is None:
            temperature = (1.0 if config.temperature is None else float(config.temperature)) if config.do_sample else 0.0
        if not temperature:
            for name in _SHARES:
                if getattr(self, name) not in (None, 1.0 if name == "top_p" else 0):
                    raise ConfigError(
                        f"{name}={getattr(self, name)} says nothing at temperature 0, where the likeliest token is taken: "
                        "give a temperature too"
                    )
        taken = {name: _first(getattr(self, name), getattr(config, name, None)) for name in _SHARES} if temperature else {}
        return replace(
            self,
            temperature=temperature,
            repetition_penalty=_first(self.repetition_penalty, config.repetition_penalty),
            num_beams=_first(self.num_beams, config.num_beams),
            **taken,
        )

    def added_by(self, config: GenerationConfig) -> str:
        """Name what the model's generation config decides; empty if it decides nothing."""
        followed = self.following(config)
        changed = {
            field.name: getattr(followed, field.name)
            for field in fields(self)
            if getattr(self, field.name) is None and getattr(followed, field.name) not in (None, _NEUTRAL.get(field.name))
        }
        return ", ".join(f"{name} {value:g}" for name, value in changed.items())

    @property
    def beams(self) -> int:
        return self.num_beams or 1

    def options(self) -> dict[str, Any]:
        """What `generate` of transformers takes."""
        chosen: dict[str, Any] = dict.fromkeys(("temperature", *_SHARES))
        if self.temperature:
            chosen = {"temperature": self.temperature, "top_k": self.top_k or 0, "top_p": self.top_p, "min_p": self.min_p}
        return chosen | {
            "do_sample": bool(self.temperature),
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": _first(self.repetition_penalty, 1.0),
            "num_beams": self.beams,
        }


_NEUTRAL = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "num_beams": 1}
"""What changes nothing."""


def _check(name: str, value: float | None, least: float, most: float, expected: str) -> None:
    if value is not None and not (least <= value <= most and abs(value) != float("inf")):
        raise ConfigError(f"{name}={value} must be {expected}")


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def load_generation_config(folder: str) -> GenerationConfig:
    """The generation config in a checkpoint's folder; one that decides nothing if there is none.

    Raises:
        CheckpointError: if it cannot be read.
    """
    if not Path(folder, "generation_config.json").is_file():
        return GenerationConfig()
    with foreign_file(f"the generation_config.json in {folder} cannot be used: mend it", CheckpointError):
        config = GenerationConfig.from_pretrained(folder)
    check_generation_config(config)
    return config


def check_generation_config(config: GenerationConfig | None) -> None:
    """Values of other types than these break `generate` in its middle.

    Raises:
        CheckpointError: which names the value.
    """
    for name, value in ({} if config is None else vars(config)).items():
        counted = value if isinstance(value, list) else [value]
        if name.endswith("_token_id"):
            right = value is None or all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in counted)
        elif name.startswith(("output_", "return_", "do_", "use_")):
            right = value is None or isinstance(value, bool)
        elif name in _NEUTRAL:
            right = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        else:
            right = True
        if not right:
            raise CheckpointError(f"generation_config.json of the model says {name}={value!r}, which is no such thing: mend it")
