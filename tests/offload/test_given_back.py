"""What a session held is given back when it is left: then, and not when Python next looks for cycles, which may be never."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model

from offload import Training, offload
from offload.storage.host_buffer import HostBuffer
from tests.architectures import make, tokens
from tests.budgets import ALL, NONE, SOME, budget_for, spec_of
from tests.delayed import DelayedDevice

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

RESERVE = {"batch_size": 2, "max_tokens": 40}
ROOMY = 1 << 22
_SMALL_BYTES = 1024


def generate(session):
    session.model.generate(tokens(2, 9), max_new_tokens=6, do_sample=False)


def leave_at_once(session):
    pass


def keep_a_prefix(session):
    session.kv_cache(list(range(3, 30)))


def tune_adapters(session):
    model = get_peft_model(session.model, LoraConfig(r=2, target_modules=["q_proj"]))
    model(input_ids=tokens(2, 12), labels=tokens(2, 12)).loss.backward()


def train(session):
    for _ in range(2):
        session.backward([lambda: session.model(input_ids=tokens(2, 12), labels=tokens(2, 12)).loss])
        session.step()


def full(state_tier, activation_tier):
    def options(folder):
        training = Training(full=True, state_tier=state_tier, activation_tier=activation_tier, state_dir=folder)
        return {"training": training, "disk_dir": folder}

    return options


USES = {
    "all resident": (ALL, generate, lambda folder: {}),
    "some resident": (SOME, generate, lambda folder: {}),
    "nothing resident": (NONE, generate, lambda folder: {}),
    "still loading": (ALL, leave_at_once, lambda folder: {}),
    "prefixes": (SOME, keep_a_prefix, lambda folder: {"prefix_cache": folder}),
    "pages": (ROOMY, generate, lambda folder: {"kv_memory": 1 << 15, "exactness": "rounding", "disk_dir": folder}),
    "adapters": (ROOMY, tune_adapters, lambda folder: {"training": Training()}),
    "states in memory": (ROOMY, train, full("cpu", "recompute")),
    "states on nvme": (ROOMY, train, full("nvme", "nvme")),
}


@pytest.fixture
def buffers(monkeypatch):
    """All host buffers made since: weak references."""
    made, init = [], HostBuffer.__init__

    def noted(self, *args, **options):
        init(self, *args, **options)
        made.append(weakref.ref(self))

    monkeypatch.setattr(HostBuffer, "__init__", noted)
    return made


@pytest.fixture
def uncollected():
    """No cycle is looked for."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def storages():
    """Of all tensors that Python knows, by address; those of a few bytes are left out."""
    found = (value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter) and not value.is_meta)
    return {value.untyped_storage().data_ptr() for value in found if value.untyped_storage().nbytes() > _SMALL_BYTES}


def assert_given_back(target, options, use, buffers):
    before = storages()
    buffers.clear()
    with offload(target, **RESERVE, **options) as session:
        use(session)
        assert any(item() is not None for item in buffers)
    # Whoever keeps the session keeps its report and its model, and no more.
    assert [item() for item in buffers if item() is not None] == []
    model = {value.untyped_storage().data_ptr() for value in (*session.model.parameters(), *session.model.buffers())}
    assert storages() - before - model == set()


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize(
    ("name", "held"),
    # What a model in memory was made of is not known, so that it has no prefixes.
    [(name, held) for name in USES for held in ("a checkpoint", "a model") if (name, held) != ("prefixes", "a model")],
)
def test_on_the_cpu(name, architecture, held, tmp_path, buffers, uncollected):
    room, use, options = USES[name]
    model, folder = make(architecture), str(tmp_path / "model")
    model.save_pretrained(folder)
    budget = room if isinstance(room, int) else budget_for(spec_of(folder, **RESERVE), room, 2, 40)
    options = {"device": "cpu", "cpu_memory": budget} | options(str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    assert_given_back(folder if held == "a checkpoint" else model, options, use, buffers)


@pytest.mark.parametrize("name", ["some resident", "nothing resident", "states in memory"])
def test_on_a_card(name, tmp_path, monkeypatch, buffers, uncollected):
    room, use, options = USES[name]
    folder = str(tmp_path / "model")
    make("llama").save_pretrained(folder)
    device = DelayedDevice()
    monkeypatch.setattr("offload.api.resolve_device", lambda name: device)
    budget = room if isinstance(room, int) else budget_for(spec_of(folder, **RESERVE), room, 2, 40)
    options = {"gpu_memory": budget, "cpu_memory": ROOMY} | options(str(tmp_path))
    assert_given_back(folder, options, use, buffers)
