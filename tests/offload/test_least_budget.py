"""The least budget that a refusal names is taken, and works: for generation, scoring and training."""

import random
from typing import Any

import pytest
import torch

from offload import BudgetTooSmall, Session, Training, offload
from tests.architectures import ARCHITECTURES, BY_NAME, SPECIAL, make
from tests.delayed import DelayedDevice

RESERVE = {"batch_size": 2, "max_tokens": 24}
NAMES = [architecture.name for architecture in (*ARCHITECTURES, *SPECIAL)]
GENERATING = [name for name in NAMES if BY_NAME[name].generates]
MEMORIES = ["shared", "discrete"]
"""Of the device that computes: the CPU's, or its own."""
TRAINED = ["norms", "a layer", "all"]


def uses() -> list[Any]:
    cases = [(name, memory, use) for name in GENERATING for memory in MEMORIES for use in ("generate", "score without cache")]
    return cases + [(name, memory, "score") for name in NAMES for memory in MEMORIES]


def trainings() -> list[Any]:
    tiers = [(state, activation) for state in ("cpu", "nvme") for activation in ("recompute", "gpu", "cpu", "nvme")]
    return [(name, memory, (what, *tier)) for name in GENERATING for memory in MEMORIES for what in TRAINED for tier in tiers]


def some(cases: list[Any], count: int) -> list[Any]:
    """A sample that is the same each time; `make test-all` runs the others."""
    chosen = set(random.Random(3).sample(range(len(cases)), count))
    return [
        pytest.param(*case, id="-".join(map(str, (case[0], case[1], *(case[2] if type(case[2]) is tuple else (case[2],))))))
        if index in chosen
        else pytest.param(*case, marks=pytest.mark.every_case)
        for index, case in enumerate(cases)
    ]


def chosen(model: torch.nn.Module, what: str) -> None:
    """Have it trained, and freeze the rest."""
    names = [name for name, _ in model.named_parameters()]
    layer = next(name for name in names if ".1." in name).partition(".1.")[0] + ".1."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(what == "all" or (parameter.dim() == 1 if what == "norms" else name.startswith(layer)))


def use(name: str, how: Any, session: Session) -> None:
    inputs = BY_NAME[name].inputs()
    if type(how) is tuple:
        labels = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        session.backward([lambda: session.model(**inputs, labels=labels).loss])
        session.step()
        return
    with torch.no_grad():
        if how == "generate":
            inputs.pop("decoder_input_ids", None)
            session.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        else:
            session.model(**inputs, **({"use_cache": False} if how == "score without cache" else {}))


def with_the_least(model: torch.nn.Module, memory: str, options: dict[str, Any], run: Any) -> list[str]:
    """Give what each refusal names, until there is none; the tiers that were refused."""
    device, host, refused = 1, 1, []
    while True:
        budgets = {"cpu_memory": device} if memory == "shared" else {"gpu_memory": device, "cpu_memory": host}
        try:
            with offload(model, **budgets, **options, **RESERVE) as session:
                run(session)
                return refused
        except BudgetTooSmall as error:
            refused.append("host" if error.of_host else "device")
            assert refused.count(refused[-1]) == 1, f"{refused}: {error}"
            device, host = (device, error.least_bytes) if error.of_host else (error.least_bytes, host)


@pytest.mark.parametrize(("name", "memory", "how"), [*some(uses(), 24), *some(trainings(), 40)])
def test_the_least_budget_works(name, memory, how, monkeypatch, tmp_path):
    if memory == "discrete":
        monkeypatch.setattr("offload.api.resolve_device", lambda device: DelayedDevice())
    model, options = make(name), {"disk_dir": tmp_path}
    if type(how) is tuple:
        what, state, activation = how
        chosen(model, what)
        options["training"] = Training(full=what == "all", state_tier=state, activation_tier=activation)
    refused = with_the_least(model, memory, options, lambda session: use(name, how, session))
    assert refused
