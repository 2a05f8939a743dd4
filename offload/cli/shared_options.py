"""The options that several commands share, and the objects that they are handed on as."""

import argparse
from collections.abc import Callable
from typing import Any

from offload.kv.options import METHODS, NONE, KvOptions
from offload.moe.options import AUTO, MISSES, POLICIES, PREFETCH, ExpertOptions


def add_kv_arguments(add: Callable[..., Any]) -> None:
    add(
        "--kv-memory",
        metavar="SIZE",
        help="device memory for keys and values, like 2GiB; the rest goes down a tier, beside a GPU to CPU memory first "
        "(default: as planned)",
    )
    add(
        "--kv-policy",
        default=NONE,
        choices=METHODS,
        help="lossy, but for none: int8 or int4 pages, a window of recent tokens, or retrieval (default: none)",
    )
    add(
        "--kv-budget",
        metavar="B",
        help="KV tokens each query attends to, for `window` and `retrieve`: 25%% or a number of tokens (default: 25%%)",
    )


def kv_options(request: argparse.Namespace, shared_tokens: int = 0, prefix_dir: str | None = None) -> KvOptions:
    """Raises ConfigError for what cannot be read."""
    return KvOptions.parse(request.kv_memory, request.kv_policy, request.kv_budget, shared_tokens, prefix_dir)


def add_expert_policy(add: Callable[..., Any]) -> None:
    add(
        "--expert-policy",
        default=AUTO,
        choices=POLICIES,
        help="which experts stay in device memory; `layers` streams whole layers instead (default: auto)",
    )


def add_expert_arguments(add: Callable[..., Any]) -> None:
    add_expert_policy(add)
    add(
        "--expert-misses",
        default=AUTO,
        choices=MISSES,
        help="on an expert-cache miss: load it to the GPU, or compute it on the CPU (default: auto)",
    )
    add(
        "--expert-prefetch",
        default=AUTO,
        choices=PREFETCH,
        help="load experts before they are asked for: in long prompts (auto), in decode too (on)",
    )


def expert_options(request: argparse.Namespace) -> ExpertOptions:
    """Raises ConfigError for what is not known."""
    names = ("policy", "misses", "prefetch")
    return ExpertOptions(**{name: getattr(request, f"expert_{name}") for name in names if hasattr(request, f"expert_{name}")})
