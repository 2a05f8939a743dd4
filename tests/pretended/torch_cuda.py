"""Stand-ins for what `torch.cuda` asks of a driver: `install()` before the first use of "cuda"."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

_CUDA = 1
"""The number of the device type."""


class _Cudart:
    def __init__(self, card: Any) -> None:
        self._card = card

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        return self._card.lock(address, nbytes)

    def cudaHostUnregister(self, address: int) -> int:
        return self._card.unlock(address)


class _Properties:
    name = "pretended card"
    major, minor = 9, 0
    multi_processor_count = 132

    def __init__(self, card: Any) -> None:
        self.total_memory = card.total_bytes


class _OnDevice:
    """`torch.cuda.device`: there is one card."""

    def __init__(self, device: Any = None) -> None:
        self.idx = 0

    def __enter__(self) -> "_OnDevice":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def load(library: Path) -> Any:
    spec = importlib.util.spec_from_file_location("pretended_card", library)
    assert spec is not None
    assert spec.loader is not None
    card = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(card)
    return card


def install(library: Path) -> Any:
    """Make `torch.cuda` believe in the card. The extension was loaded into the process before torch was imported."""
    card = load(library)
    generator = torch.Generator("cpu")
    generator.manual_seed(0)
    card.set_generator(generator)
    answers = _state(card) | _memory(card) | _random_numbers(generator)
    for name, value in answers.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.is_pinned = lambda self, device=None: (
        self.device.type == "cpu" and card.is_locked(self.data_ptr(), self.nbytes)
    )
    torch.histc = _histc_of_integers(torch.histc)
    torch.backends.cuda.is_built = lambda: True
    return card


def _state(card: Any) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    return {
        "default_stream": lambda chosen=None: torch.Stream(stream_id=0, device_index=0, device_type=_CUDA),
        "Stream": torch.Stream,
        "Event": lambda enable_timing=False, **other: torch.Event(device, enable_timing=enable_timing),
        "stream": lambda stream: stream,
        "current_stream": lambda chosen=None: torch.accelerator.current_stream(0),
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda chosen: None,
        "device": _OnDevice,
        "device_of": _OnDevice,
        "synchronize": lambda chosen=None: torch.accelerator.synchronize(),
        "cudart": lambda: _Cudart(card),
        # Nothing here takes as long as it should: what waits for it, waits for the order.
        "_sleep": lambda cycles: None,
        "get_device_name": lambda chosen=None: _Properties.name,
        "get_device_capability": lambda chosen=None: (_Properties.major, _Properties.minor),
        "get_device_properties": lambda chosen=None: _Properties(card),
        "is_bf16_supported": lambda *args, **kwargs: True,
        "is_current_stream_capturing": lambda: False,
        "_is_in_bad_fork": lambda: False,
    }


def _memory(card: Any) -> dict[str, Any]:
    held, peak = (lambda device=None: card.held_bytes()), (lambda device=None: card.peak_bytes())
    return {
        "mem_get_info": lambda device=None: (card.total_bytes - card.held_bytes(), card.total_bytes),
        "memory_allocated": held,
        "memory_reserved": held,
        "max_memory_allocated": peak,
        "max_memory_reserved": peak,
        "reset_peak_memory_stats": lambda device=None: card.reset_peak(),
        "set_per_process_memory_fraction": lambda fraction, device=None: card.set_fraction(fraction),
        "get_per_process_memory_fraction": lambda device=None: card.fraction(),
        "empty_cache": lambda: None,
    }


def _random_numbers(generator: torch.Generator) -> dict[str, Any]:
    def seed_all(value: int) -> None:
        generator.manual_seed(value)

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        generator.set_state(state)

    return {
        "manual_seed": seed_all,
        "manual_seed_all": seed_all,
        "seed": generator.seed,
        "initial_seed": generator.initial_seed,
        "get_rng_state": lambda device=None: generator.get_state(),
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: set_state(states[0]),
    }


def _histc_of_integers(histc: Any) -> Any:
    """A card's kernel takes integers, the CPU's does not."""

    def counted(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if values.is_cuda and not values.is_floating_point():
            return histc(values.float(), *args, **kwargs).to(values.dtype)
        return histc(values, *args, **kwargs)

    return counted
