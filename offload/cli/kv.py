"""The options of the KV cache, which `generate` and `plan` share."""

import argparse
from collections.abc import Callable
from typing import Any

from offload.config import parse_bytes
from offload.kv.options import METHODS, NONE, KvOptions
from offload.kv.policies.budget import KvBudget


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
    add("--kv-budget", metavar="B", help="what a query sees by window and retrieve: 25%% or a number of tokens (default: 25%%)")


def kv_options(request: argparse.Namespace) -> KvOptions:
    """Raises ConfigError for what cannot be read."""
    budget = None if request.kv_budget is None else KvBudget.parse(request.kv_budget)
    return KvOptions(parse_bytes(request.kv_memory, "--kv-memory"), request.kv_policy, budget)
