"""torch.compile in a session: the code of each layer is compiled, as of the plain model that is compiled layer by layer."""

import copy
import functools

import pytest
import torch

from offload import Training, offload
from tests.architectures import make, oracle_of, tokens
from tests.budgets import NONE, SOME, budget_for, spec_of
from tests.poison import poison_homes

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]
RESERVE = {"batch_size": 2, "max_tokens": 24}
BACKEND = "aot_eager"
NAMES = ["llama", "gpt2", "gemma3", "mixtral"]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def by_layer(model, backend=BACKEND):
    for layer in layers_of(model):
        layer.compile(backend=backend)
    return model


def whole(model):
    model.compile(backend=BACKEND)
    return model


def forward(model):
    model.forward = torch.compile(model.forward, backend=BACKEND)
    return model


def each_replaced(model):
    layers = layers_of(model)
    for index in range(len(layers)):
        layers[index] = torch.compile(layers[index], backend=BACKEND)
    return model


WAYS = {
    "compile()": whole,
    "torch.compile": lambda model: torch.compile(model, backend=BACKEND),
    "each layer": by_layer,
    "forward": forward,
    "each layer replaced": each_replaced,
}


def budget_of(model, residency):
    return budget_for(spec_of(model, **RESERVE), residency, 2, 24)


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def given(model):
    """Logits of a pass, of a cached one, and tokens."""
    with torch.no_grad():
        first = model(input_ids=tokens(), use_cache=True)
        second = model(input_ids=tokens()[:, :1], past_key_values=first.past_key_values)
        found = [first.logits, second.logits]
        return [*found, model.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)]


@functools.cache
def compiled_plainly(name):
    """What the plain model gives whose layers are compiled."""
    model = oracle_of(make(name))
    torch._dynamo.reset()
    wanted = given(by_layer(model))
    torch._dynamo.reset()
    return wanted


def assert_same(ours, theirs):
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.equal(mine, wanted)


SLOW = pytest.mark.slow
BEFORE_OR_INSIDE = [
    pytest.param(way, before, marks=[] if (way == "torch.compile") == before else SLOW)
    for way in WAYS
    for before in (True, False)
]


@pytest.mark.parametrize(("way", "before"), BEFORE_OR_INSIDE)
def test_layers_are_compiled_and_windows_are_not(way, before):
    model = make("llama")
    wanted = compiled_plainly("llama")
    budget = budget_of(model, SOME)
    target = WAYS[way](model) if before else model
    torch._dynamo.utils.counters.clear()
    with offload(target, device="cpu", cpu_memory=budget, **RESERVE) as session:
        assert session.plan.weights.streamed
        compiled = session.model if before else WAYS[way](session.model)
        poison_homes(session)
        assert_same(given(compiled), wanted)
        assert_same(given(compiled), wanted)
        assert graphs() >= 4
        assert session.report().exactness == "rounding"
        made = graphs()
        assert_same(given(compiled), wanted)
        assert graphs() == made, "compiled again"


@pytest.mark.parametrize("residency", [pytest.param(NONE, marks=SLOW), SOME])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_plain_model_compiled_layer_by_layer(name, residency):
    model = make(name)
    wanted = compiled_plainly(name)
    budget = budget_of(model, residency)
    with offload(model, device="cpu", cpu_memory=budget, **RESERVE) as session:
        poison_homes(session)
        assert_same(given(whole(session.model)), wanted)
        # Where the budget has no room for a layer, it is streamed in parts and not compiled.
        said = " ".join(session.report().fallbacks)
        assert ("are not compiled" in said) != (session.report().exactness == "rounding")


def test_a_graph_of_the_whole_model_is_refused():
    model = make("llama")
    with torch.no_grad():
        wanted = oracle_of(model)(input_ids=tokens()).logits
    with offload(model, device="cpu", cpu_memory=budget_of(model, SOME), **RESERVE) as session, torch.no_grad():
        compiled = torch.compile(session.model, backend=BACKEND, fullgraph=True)
        with pytest.raises(Exception, match="leave fullgraph=True out"):
            compiled(input_ids=tokens())
        # And nothing is left of it.
        torch._dynamo.reset()
        assert torch.equal(session.model(input_ids=tokens()).logits, wanted)


def test_training_goes_on_without_compiled_code():
    model = make("llama")
    twin = copy.deepcopy(model)
    labels = {"input_ids": tokens(), "labels": tokens()}
    loss = twin(**labels).loss
    loss.backward()
    with offload(model, device="cpu", cpu_memory="16MiB", training=Training(), **RESERVE) as session:
        compiled = whole(session.model)
        ours = compiled(**labels).loss
        ours.backward()
        assert torch.equal(ours, loss)
        assert torch.equal(model.lm_head.weight.grad, twin.lm_head.weight.grad)
        assert any("gradients are recorded" in sentence for sentence in session.report().fallbacks)


@pytest.mark.slow
def test_inductor():
    model = make("llama")
    wanted = given(by_layer(oracle_of(model), "inductor"))
    budget = budget_of(model, SOME)
    torch._dynamo.reset()
    with offload(model, device="cpu", cpu_memory=budget, **RESERVE) as session:
        poison_homes(session)
        session.model.compile(backend="inductor")
        assert_same(given(session.model), wanted)
