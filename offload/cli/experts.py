"""`offload experts replay`: what cache policies would have made of a recorded run."""

import json
from dataclasses import asdict

from rich.table import Table

from offload.cli.arguments.others import ReplayArguments
from offload.cli.terminal import print_table
from offload.config import parse_bytes
from offload.scheduler.expert_replay import POLICIES, Replay, Tally, replay, slots_in
from offload.scheduler.routing import Routing
from offload.storage.errors import ConfigError, gib


def run(request: ReplayArguments) -> None:
    asked = ",".join(POLICIES) if request.policy is None else request.policy
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names or any(name not in POLICIES for name in names):
        raise ConfigError(f"--policy {request.policy!r} must name some of {','.join(POLICIES)}")
    if request.slots_per_layer is not None and request.slots_per_layer < 1:
        raise ConfigError(f"--slots-per-layer {request.slots_per_layer} must be at least 1")
    budget = parse_bytes(request.budget, "--budget")
    routing = Routing.load(request.trace)
    per_layer = request.slots_per_layer
    slots = slots_in(routing, budget) if budget is not None else (per_layer or 0) * routing.layers
    results = [replay(routing, name, slots, request.scope) for name in names]
    if request.json:
        print(json.dumps({"trace": request.trace, "model": routing.model, "scope": request.scope, "policies": _facts(results)}))
    else:
        _print(routing, request.scope, results)


def _facts(results: list[Replay]) -> list[dict[str, object]]:
    def facts(tally: Tally) -> dict[str, object]:
        return asdict(tally) | {"hit_rate": tally.hit_rate}

    return [
        {"policy": item.policy, "slots": item.slot_count}
        | {name: facts(tally) for name, tally in (("all", item.overall), ("decode", item.decode), ("second_half", item.warm))}
        for item in results
    ]


def _print(routing: Routing, scope: str, results: list[Replay]) -> None:
    print(
        f"{routing.model}: {routing.layers} layers of {routing.experts} experts, {results[0].slot_count:,} slots "
        f"({'shared' if scope == 'global' else 'each layer its own'}), {len(routing.visits):,} visits\n"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("policy", "hits", "in decode", "in the second half", "copied", "bytes copied", "bytes missed"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for item in results:
        every = item.overall
        table.add_row(
            item.policy,
            f"{every.hit_rate:.1%}",
            f"{item.decode.hit_rate:.1%}" if item.decode.choices else "",
            f"{item.warm.hit_rate:.1%}",
            f"{every.copies:,}",
            gib(every.copied_bytes),
            gib(every.missed_bytes),
        )
    print_table(table)
