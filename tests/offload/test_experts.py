"""Single experts in a session: what a user changes, asks for, and gets told."""

import copy
import json

import pytest
import torch
import transformers as hf
from torch.nn.utils import parametrize

from offload import BudgetTooSmall, ConfigError, SessionError, offload
from offload.cli.main import main
from offload.model.experts import find_experts
from offload.scheduler.routing import Routing
from offload.storage.errors import StaleSlot
from tests.architectures import make, oracle_of, tokens
from tests.delayed import DelayedDevice
from tests.offload.test_expert_classes import plan_for
from tests.plans import edited
from tests.poison import DiskMeter, poison_homes

OPTIONS = {"device": "cpu", "batch_size": 2, "max_tokens": 40}
NAMES = ["mixtral", "qwen3_moe", "gpt_oss"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}

    def save(name):
        if name not in folders:
            path = tmp_path_factory.mktemp(name)
            model = make(name)
            model.save_pretrained(path)
            folders[name] = str(path), model
        return folders[name]

    return save


def generate(model, ids, **options):
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=6, do_sample=False, **options)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_whatever_computes_experts_computes_the_same(name, implementation, saved):
    folder, model = saved(name)
    twin = oracle_of(model)
    twin.set_experts_implementation(implementation)
    for slots in (2, 5):
        with offload(folder, plan=plan_for(model, slots), **OPTIONS) as session:
            session.model.set_experts_implementation(implementation)
            poison_homes(session)
            with torch.no_grad():
                assert torch.equal(session.model(tokens()).logits, twin(tokens()).logits)
            assert torch.equal(generate(session.model, tokens()), generate(twin, tokens()))
            assert torch.equal(generate(session.model, tokens(), num_beams=2), generate(twin, tokens(), num_beams=2))


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_are_what_they_were(name, saved, tmp_path):
    folder, model = saved(name)
    with offload(folder, plan=plan_for(model, 3), **OPTIONS) as session:
        generate(session.model, tokens())
        state = session.model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        session.model.save_pretrained(tmp_path / "again")
        # It goes on as before.
        assert torch.equal(generate(session.model, tokens()), generate(oracle_of(model), tokens()))
    again = type(model).from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_after_the_context_the_model_computes_as_before(name, saved):
    folder, model = saved(name)
    with offload(folder, plan=plan_for(model, 3), **OPTIONS) as session:
        pass
    copied = copy.deepcopy(session.model)
    for each in (session.model, copied):
        assert torch.equal(generate(each, tokens()), generate(oracle_of(model), tokens()))
    for unit in find_experts(session.model):
        assert not any("forward" in vars(module) for module in unit.module.modules())
        assert not unit.module._forward_pre_hooks and not unit.module._state_dict_pre_hooks


def test_a_model_that_the_user_holds_gets_its_experts_back(tmp_path):
    model = make("mixtral")
    twin = oracle_of(model)
    parameters = {name: id(value) for name, value in model.named_parameters()}
    with offload(model, plan=plan_for(model, 4), disk_dir=tmp_path, **OPTIONS) as session:
        assert poison_homes(session)
        assert torch.equal(generate(model, tokens()), generate(twin, tokens()))
        for block in session._parts.components["experts"].homes:
            for home in block:
                home.tensor.copy_(twin.get_parameter(home.name))
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in model.state_dict().items())
    assert torch.equal(generate(model, tokens()), generate(twin, tokens()))


def test_what_is_written_to_an_expert_counts(tmp_path):
    model = make("mixtral")
    twin = oracle_of(model)
    with offload(model, plan=plan_for(model, 4), disk_dir=tmp_path, **OPTIONS):
        generate(model, tokens())
        for each in (model, twin):
            with torch.no_grad():
                each.model.layers[1].mlp.experts.down_proj.mul_(-2)
        assert torch.equal(generate(model, tokens()), generate(twin, tokens()))
        for each in (model, twin):
            with torch.no_grad():
                each.model.layers[1].mlp.experts.down_proj[2].add_(1)
        assert torch.equal(generate(model, tokens()), generate(twin, tokens()))
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, twin.model.layers[1].mlp.experts.down_proj)


def test_what_was_asked_for_and_cannot_be_is_told(saved, monkeypatch):
    folder, model = saved("qwen3_moe")
    options = {"plan": plan_for(model, 5), "expert_policy": "admission", "expert_prefetch": "on"}
    monkeypatch.setattr("offload.moe.component.find_router", lambda model, key: None)
    monkeypatch.setattr("offload.moe.routing_log._MOST_BYTES", 0)
    with offload(folder, **options, **OPTIONS) as session:
        generate(session.model, tokens())
        assert session.routing().visits
        said = " ".join(session.report().fallbacks)
        for words in ("admission keeps what lfu keeps", "no router beside their experts", "later ones are left out"):
            assert words in said


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_an_adapter_on_experts_is_refused_and_not_passed_over(saved):
    folder, model = saved("mixtral")
    with offload(folder, plan=plan_for(model, 4), **OPTIONS) as session:
        experts = session.model.model.layers[1].mlp.experts
        parametrize.register_parametrization(experts, "down_proj", Doubled(), unsafe=True)
        with pytest.raises(SessionError, match="expert_policy='layers'"):
            generate(session.model, tokens())
        parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)


def test_backward_is_refused(saved):
    folder, model = saved("mixtral")
    with offload(folder, plan=plan_for(model, 4), **OPTIONS) as session:
        loss = session.model(tokens(), labels=tokens()).loss
        with pytest.raises(StaleSlot, match="outside of the context"):
            loss.backward()


@pytest.mark.parametrize("slots", [2, 3, 9])
def test_a_failed_read_is_loud_and_leaves_nothing_wrong(slots, saved, monkeypatch):
    folder, model = saved("mixtral")
    twin = oracle_of(model)
    with offload(folder, plan=plan_for(model, slots), **OPTIONS) as session:
        poison_homes(session)
        generate(session.model, tokens())
        engine, read = session.machine.host.engine, session.machine.host.engine.read
        cache = session._parts.components["experts"].streaming.cache
        rooms = [cache.room(layer) for layer in range(4)]
        calls = []

        def failing(*args):
            calls.append(args)
            if len(calls) == 3:
                raise OSError("the disk is gone")
            return read(*args)

        monkeypatch.setattr(engine, "read", failing)
        with pytest.raises(OSError, match="disk is gone"):
            generate(session.model, tokens() + 1)
        monkeypatch.setattr(engine, "read", read)
        assert [cache.room(layer) for layer in range(4)] == rooms
        assert torch.equal(generate(session.model, tokens()), generate(twin, tokens()))


@pytest.mark.parametrize("slots", [2, 5, 12])
@pytest.mark.parametrize("prefetch", ["auto", "off"])
def test_a_long_prompt_brings_each_expert_once(prefetch, slots, saved):
    folder, model = saved("mixtral")
    units = find_experts(model)
    with offload(folder, plan=plan_for(model, slots), expert_prefetch=prefetch, **OPTIONS) as session, torch.no_grad():
        poison_homes(session)
        meter = DiskMeter(session)
        ids = tokens(2, 20)
        assert torch.equal(session.model(ids).logits, oracle_of(model)(ids).logits)
        # Every expert was asked for, and there was none to begin with.
        assert meter.nbytes == sum(unit.count * unit.nbytes for unit in units)
        assert (session._parts.components["experts"].tally.prefetches > 0) == (prefetch == "auto" and slots == 12)


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_looking_ahead_changes_nothing(prefetch, saved):
    folder, model = saved("qwen3_moe")
    with offload(folder, plan=plan_for(model, 5), expert_prefetch=prefetch, **OPTIONS) as session:
        poison_homes(session)
        ids = tokens(1, 5)
        assert torch.equal(generate(session.model, ids), generate(oracle_of(model), ids))
        use = session.report().experts
        assert bool(use.prefetches) == (prefetch == "on")
        if prefetch == "on":
            assert 0 < use.recall <= use.recall_at_2k <= 1
            assert use.prefetches_used <= use.prefetches


@pytest.fixture
def device(monkeypatch):
    device = DelayedDevice()
    monkeypatch.setattr("offload.api.resolve_device", lambda name: device)
    return device


def beside(model, slots, in_host):
    plan = plan_for(model, slots)
    staging = 0 if in_host == sum(unit.count for unit in find_experts(model)) else 3
    return edited(plan, "experts", in_host_memory=in_host, staging_count=staging)


@pytest.mark.parametrize("in_host", [0, 7, 16])
@pytest.mark.parametrize("slots", [2, 5, 16])
@pytest.mark.parametrize("name", NAMES)
def test_identical_on_a_device_with_memory_of_its_own(name, slots, in_host, saved, device):
    folder, model = saved(name)
    twin = oracle_of(model)
    total = sum(unit.count for unit in find_experts(model))
    options = {"gpu_memory": 1 << 28, "cpu_memory": 1 << 28, "batch_size": 2, "max_tokens": 40}
    with offload(folder, plan=beside(model, min(slots, total), min(in_host, total)), **options) as session:
        poison_homes(session)
        meter = DiskMeter(session)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(session.model(tokens()).logits, twin(tokens()).logits)
        assert torch.equal(generate(session.model, tokens()), generate(twin, tokens()))
        assert (meter.nbytes > 0) == (min(in_host, total) < total)


@pytest.mark.parametrize("name", NAMES)
def test_misses_computed_on_the_cpu(name, saved, device):
    folder, model = saved(name)
    twin = oracle_of(model)
    total = sum(unit.count for unit in find_experts(model))
    options = {"gpu_memory": 1 << 28, "cpu_memory": 1 << 28, "batch_size": 2, "max_tokens": 40, "expert_misses": "cpu"}
    with offload(folder, plan=beside(model, 4, total), **options) as session:
        poison_homes(session)
        with torch.no_grad():
            for ids in (tokens(), tokens(1, 3)):
                found, wanted = session.model(ids).logits, twin(ids).logits
                assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()
        assert torch.equal(generate(session.model, tokens()), generate(twin, tokens()))
        report = session.report()
        assert report.exactness == "rounding"
        assert report.experts.computed_on_cpu > 0
        assert report.experts.policy == "admission"
        for layer in report.experts.layers:
            assert layer.choices == layer.hits + layer.copies + layer.computed_on_cpu
        assert report.experts.copied_bytes == session._parts.components["experts"].streaming.store.copied_bytes


def test_the_report_tells_of_experts(saved, tmp_path):
    folder, model = saved("mixtral")
    with offload(folder, plan=plan_for(model, 5), **OPTIONS) as session:
        meter = DiskMeter(session)
        generate(session.model, tokens(1, 3))
        read = meter.nbytes
        report = session.report()
        use = report.experts
        assert use.slots == 5 and use.experts == sum(unit.count for unit in find_experts(model))
        assert use.choices == use.hits + use.copies > 0
        assert use.copied_bytes == read
        assert use.belady["measured_hits"] <= use.belady["hits"] <= use.belady["choices"] == use.choices
        assert "all-knowing" in str(report)
        assert type(report).from_dict(json.loads(report.to_json())) == report
        session.routing().save(tmp_path / "trace.csv")
        assert len(Routing.load(tmp_path / "trace.csv").visits) == len(session.routing().visits)
        assert report.exactness == "identical"


def test_whole_layers_where_that_is_asked_for(saved):
    folder, _ = saved("mixtral")
    with pytest.raises(BudgetTooSmall) as refusal:
        offload(folder, cpu_memory=1, expert_policy="layers", **OPTIONS).__enter__()
    with offload(folder, cpu_memory=refusal.value.least_bytes, expert_policy="layers", **OPTIONS) as session:
        assert session.plan.experts.slots == 0
        assert session.report().experts is None
        assert not session.routing().visits


_TINY = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNDECORATED = {
    "JetMoe": lambda: hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            **_TINY, hidden_size=32, num_hidden_layers=3, num_key_value_heads=2, kv_channels=8, intermediate_size=48,
            num_local_experts=4, num_experts_per_tok=2,
        )
    ),
    "Dbrx": lambda: hf.DbrxForCausalLM(
        hf.DbrxConfig(
            **_TINY, d_model=32, n_heads=4, n_layers=3, max_seq_len=64, attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        )
    ),
    "Llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **_TINY, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, attention_chunk_size=32,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNDECORATED))
def test_experts_of_another_kind_stream_in_their_layers_and_that_is_told(name, tmp_path):
    torch.manual_seed(0)
    model = UNDECORATED[name]().eval()
    twin = oracle_of(model)
    with pytest.raises(BudgetTooSmall) as refusal:
        offload(model, cpu_memory=1, disk_dir=tmp_path, **OPTIONS).__enter__()
    with offload(model, cpu_memory=refusal.value.least_bytes, disk_dir=tmp_path, **OPTIONS) as session, torch.no_grad():
        assert session.plan.weights.streamed and not session.plan.experts.slots
        assert torch.equal(model(tokens()).logits, twin(tokens()).logits)
        assert any("whole layers" in sentence for sentence in session.report().fallbacks)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"expert_policy": "best"}, "expert_policy"),
        ({"expert_misses": "gpu"}, "expert_misses"),
        ({"expert_prefetch": "yes"}, "expert_prefetch"),
        ({"expert_misses": "cpu"}, "CPU is what computes"),
    ],
)
def test_bad_requests(options, said, saved):
    folder, _ = saved("mixtral")
    with pytest.raises(ConfigError, match=said), offload(folder, **(OPTIONS | options)):
        pass


def test_commands(tmp_path, capsys):
    trace = tmp_path / "t.csv"
    visits = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n" + "".join(
        f"0,1,{step},{layer},{slot},{(step + slot + layer) % 4},0.5,0,1000\n"
        for step in range(9)
        for layer in range(2)
        for slot in range(2)
    )
    trace.write_text(visits)
    assert main(["experts", "replay", str(trace), "--slots-per-layer", "2", "--scope", "layer", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [item["policy"] for item in content["policies"]] == ["lru", "lfu", "admission", "belady"]
    assert all(item["all"]["choices"] == 36 for item in content["policies"])
    assert main(["experts", "replay", str(trace), "--budget", "3000B"]) == 0
    assert "belady" in capsys.readouterr().out
    assert main(["experts", "replay", str(trace), "--budget", "999B"]) == 1
    assert "smaller than one expert" in capsys.readouterr().err
    assert main(["experts", "replay", str(trace), "--budget", "3000B", "--policy", "best"]) == 1
    assert main(["experts", "replay", str(tmp_path / "none.csv"), "--budget", "3000B"]) == 1
