"""After the context the model is as it was, however the context ended."""

import copy
import os
import signal
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch

from offload import BudgetExceeded, ConfigError, SessionError, StaleSlot, offload
from offload.runtime.executor import SharedLock
from offload.runtime.placement import Placement
from tests.architectures import BY_NAME, make, oracle_of, tokens
from tests.budgets import ALL, NONE, SOME, budget_for, spec_of
from tests.poison import poison_homes

HELD = [NONE, SOME, ALL]


def budget_of(model, residency=SOME, batch_size=2, max_tokens=16):
    return budget_for(spec_of(model), residency, batch_size, max_tokens)


def opened(model, residency=SOME, **options):
    budget = budget_of(model, residency)
    return offload(model, device="cpu", cpu_memory=budget, batch_size=2, max_tokens=16, **options)


def footprint(model):
    """What must be the same before and after."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    identity = {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)}
    buffers = {name: (id(value), value.clone()) for name, value in model.named_buffers()}
    return state, identity, buffers, type(model)


def assert_undone(model, before):
    state, identity, buffers, kind = before
    assert type(model) is kind
    now = model.state_dict()
    assert list(now) == list(state)
    for name, value in state.items():
        assert torch.equal(now[name], value), name
    assert {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)} == identity
    for name, value in model.named_buffers():
        assert id(value) == buffers[name][0]
        assert torch.equal(value, buffers[name][1])
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not torch.nn.modules.module._global_parameter_registration_hooks
    assert not torch.nn.modules.module._global_module_registration_hooks


@pytest.mark.parametrize("residency", HELD)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_held_model_comes_back(name, residency):
    model = make(name, True)
    wanted = oracle_of(model)(**BY_NAME[name].inputs())[0]
    before = footprint(model)
    with opened(model, residency):
        model(**BY_NAME[name].inputs())
    assert_undone(model, before)
    assert torch.equal(model(**BY_NAME[name].inputs())[0], wanted)
    if name in ("llama", "gpt2"):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_a_model_from_a_file_is_not_copied(tmp_path):
    from transformers import AutoModelForCausalLM

    make("llama", True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = footprint(model)
    places = {name: value.data_ptr() for name, value in model.named_parameters()}
    with opened(model, NONE) as session:
        assert not session._parts.residency.placement._spills
        model(input_ids=tokens())
    assert_undone(model, before)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == places


@pytest.mark.parametrize("residency", HELD)
@pytest.mark.parametrize("error", [RuntimeError("inside"), KeyboardInterrupt(), torch.OutOfMemoryError("too much")])
def test_undone_after_an_exception_in_the_middle_of_a_pass(error, residency):
    model = make("llama", True)
    before = footprint(model)

    def fail(*args):
        raise error

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(type(error)), opened(model, residency):
        try:
            model(input_ids=tokens())
        finally:
            handle.remove()
    assert_undone(model, before)


def test_a_session_goes_on_after_an_exception():
    model = make("llama", True)
    wanted = oracle_of(model)(input_ids=tokens()).logits
    with opened(model, NONE):
        handle = model.model.layers[1].register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=tokens())
        handle.remove()
        assert torch.equal(model(input_ids=tokens()).logits, wanted)


@contextmanager
def ctrl_c_after(seconds):
    # In a job that a shell put into the background, the signal is ignored from the start.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        yield
    finally:
        timer.cancel()
        timer.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, handler)


# From before the model is taken hold of until many passes later.
@pytest.mark.parametrize("milliseconds", [0, 2, 4, 6, 8, 10, 15, 20, 25, 30, 40, 60, 100, 300])
def test_undone_after_ctrl_c_at_any_time(milliseconds, tmp_path):
    model = make("llama", True)
    before = footprint(model)
    with pytest.raises(KeyboardInterrupt), ctrl_c_after(milliseconds / 1000), opened(model, NONE, disk_dir=tmp_path):
        while True:
            model(input_ids=tokens())
    assert_undone(model, before)


def test_ctrl_c_while_spilling_is_taken_at_once_and_leaves_nothing(tmp_path):
    model = make("llama", True)
    before = footprint(model)
    told = []

    def interrupt(what, done, total):
        told.append(what)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), ctrl_c_after(60):
        opened(model, NONE, disk_dir=tmp_path, progress=interrupt).__enter__()
    assert told == ["spilling"]
    assert_undone(model, before)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_the_model_is_given_back_waits_until_it_is(monkeypatch):
    model = make("llama", True)
    before = footprint(model)
    restore = Placement.restore

    def interrupted(placement):
        signal.raise_signal(signal.SIGINT)
        restore(placement)

    monkeypatch.setattr(Placement, "restore", interrupted)
    with pytest.raises(KeyboardInterrupt), ctrl_c_after(60), opened(model, NONE):
        model(input_ids=tokens())
    assert_undone(model, before)


def test_undone_when_entering_fails(monkeypatch):
    model = make("llama", True)
    before = footprint(model)
    monkeypatch.setattr("offload.runtime.executor.LayerExecutor.arrange", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), opened(model, NONE):
        pass
    assert_undone(model, before)


def test_two_threads_take_turns():
    model = make("llama", True)
    inputs = [tokens(2, length) for length in (5, 7)]
    wanted = [oracle_of(model)(input_ids=item).logits for item in inputs]
    wrong = []

    def work(index):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(model(input_ids=inputs[index]).logits, wanted[index]):
                    wrong.append(index)

    with opened(model, NONE) as session:
        poison_homes(session)
        threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_inference_mode_first_and_training_after():
    model = make("llama", True)
    with opened(model, NONE), torch.inference_mode():
        model(input_ids=tokens())
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(value.grad is not None for value in model.parameters())


def test_entered_under_inference_mode_and_trained_after():
    model = make("llama", True)
    with torch.inference_mode(), opened(model, SOME):
        model(input_ids=tokens())
    model(input_ids=tokens(), labels=tokens()).loss.backward()


@pytest.mark.parametrize("residency", [NONE, SOME])
def test_backward_raises_instead_of_being_wrong(residency):
    model = make("llama", True)
    with opened(model, residency):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        with pytest.raises(StaleSlot, match="forward pass only"):
            loss.backward()


@pytest.mark.parametrize("residency", HELD)
def test_in_place_edits_are_seen_and_stay(residency):
    model = make("llama", False)
    twin = oracle_of(model)
    with opened(model, residency):
        model(input_ids=tokens())
        for each in (model, twin):
            with torch.no_grad():
                each.model.layers[1].mlp.up_proj.weight.mul_(1.5)
                each.model.embed_tokens.weight[5].add_(1)
                each.lm_head.weight[7].zero_()
        assert torch.equal(model(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)
        assert torch.equal(model(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("residency", HELD)
def test_loading_a_state_dict_inside(residency):
    model, other = make("llama", False), make("llama", False, seed=3)
    with opened(model, residency):
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(input_ids=tokens()).logits, oracle_of(other)(input_ids=tokens()).logits)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("residency", HELD)
def test_reading_inside(residency, tmp_path):
    model = make("llama", True)
    twin = oracle_of(model)
    with opened(model, residency):
        assert model.dtype == torch.float32
        assert model.device == torch.device("cpu")
        for name, value in twin.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)


def test_saving_one_tensor_saves_only_its_bytes(tmp_path):
    model = make("llama", False)
    with opened(model, SOME):
        for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            value = model.get_parameter(name)
            torch.save(value, tmp_path / "one.pt")
            assert (tmp_path / "one.pt").stat().st_size < value.nbytes + 4096


def test_what_cannot_be_done_inside_says_so():
    model = make("llama", True)
    with opened(model):
        with pytest.raises(SessionError, match="while the model is offloaded"):
            model.to(torch.bfloat16)
        with pytest.raises(SessionError, match="while the model is offloaded"):
            model.half()
        with pytest.raises(SessionError, match="Leave the context first"):
            model.to("meta")
        with pytest.raises(SessionError, match="Copying"):
            copy.deepcopy(model)
        with pytest.raises(SessionError, match="pickling"):
            torch.save(model, os.devnull)
        with pytest.raises(SessionError, match="offloaded already"), opened(model):
            pass
        with pytest.warns(UserWarning, match="does nothing"):
            assert model.to("cpu") is model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert model.cpu() is model
        model(input_ids=tokens())
    model.to(torch.bfloat16)


def test_a_session_is_entered_once():
    session = opened(make("llama", True))
    with session:
        pass
    with pytest.raises(SessionError, match="entered already"), session:
        pass


@pytest.mark.filterwarnings("ignore::FutureWarning:peft")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_added_inside_are_used():
    from peft import LoraConfig, get_peft_model

    model = make("llama", False)
    twin = oracle_of(model)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with opened(model, SOME) as session:
        model(input_ids=tokens())
        torch.manual_seed(3)
        mine = get_peft_model(model, config)
        torch.manual_seed(3)
        theirs = get_peft_model(twin, config)
        poison_homes(session)
        with torch.no_grad():
            assert torch.equal(mine(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)
            assert torch.equal(mine(input_ids=tokens()).logits, theirs(input_ids=tokens()).logits)
    assert all("forward" not in vars(module) for module in model.modules())


def test_resized_embeddings_are_used():
    model = make("llama", False)
    twin = oracle_of(model)
    with opened(model, SOME):
        model(input_ids=tokens())
        for each in (model, twin):
            torch.manual_seed(4)
            each.resize_token_embeddings(104, mean_resizing=False)
        ids = torch.full((1, 3), 100)
        assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)
    assert model.get_input_embeddings().weight.shape[0] == 104
    assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)


def test_the_kv_cache_takes_from_residents_and_then_stops():
    model = make("llama", False)
    twin = oracle_of(model)
    with opened(model, SOME) as session:
        resident = len(session.plan.weights.resident)
        long = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
        assert torch.equal(model.generate(tokens(), **long), twin.generate(tokens(), **long))
        assert len(session.plan.weights.resident) < resident
        assert any("given up" in sentence for sentence in session.report().fallbacks)
        assert session.machine.ledger.peak_bytes <= session.machine.ledger.budget_bytes
        with pytest.raises(BudgetExceeded, match=r"needs .* of KV cache .* would do"):
            model(input_ids=tokens(64, 100))
        assert torch.equal(model(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)


def test_a_model_without_repeated_blocks_is_streamed_by_leaves():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Conv1d(1, 3, 5)).eval()
    twin = copy.deepcopy(model)
    inputs = torch.randn(4, 1, 64)
    with offload(model, device="cpu", cpu_memory=45_000, max_tokens=1) as session:
        assert session.plan.weights.streamed
        poison_homes(session)
        assert torch.equal(model(inputs), twin(inputs))
        assert any("single modules" in sentence for sentence in session.report().fallbacks)


def test_parameters_read_without_their_module_being_called():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
    twin = copy.deepcopy(model)
    inputs = torch.randn(2, 5, 32)
    with torch.no_grad(), opened(model, NONE) as session:
        assert session.plan.weights.streamed
        poison_homes(session)
        assert torch.equal(model(inputs), twin(inputs))


def test_the_report_can_be_read_after_the_context():
    model = make("llama", True)
    with opened(model, NONE) as session:
        model(input_ids=tokens())
    report = session.report()
    assert report.links["disk"].bytes > 0
    assert report.tiers["cpu"].used_bytes == 0
    assert "exactness identical" in str(report)


@pytest.mark.parametrize("residency", HELD)
def test_entered_under_inference_mode(residency, tmp_path):
    """A natural way to write it; what the session makes outlives that mode, and is written to after it."""
    model = make("llama", True)
    model.save_pretrained(tmp_path)
    budget = budget_of(str(tmp_path), residency)
    options = {"device": "cpu", "cpu_memory": budget, "batch_size": 2, "max_tokens": 16}
    wanted = oracle_of(model)(input_ids=tokens()).logits.detach()
    with torch.inference_mode(), offload(str(tmp_path), **options) as session:
        assert torch.equal(session.model(input_ids=tokens()).logits, wanted)
        if residency != NONE:
            # More than was reserved: blocks are given up within the mode.
            session.model.generate(tokens(2, 9), max_new_tokens=24, do_sample=False)
    after = session.model
    assert not any(value.is_inference() for value in (*after.parameters(), *after.buffers()))
    with torch.no_grad():
        for value in after.parameters():
            value.mul_(2)
    with opened(after, residency) as session:
        session.model(input_ids=tokens())


def test_what_was_made_under_inference_mode_is_refused():
    """torch counts no writes to it: they would not be seen."""
    with torch.inference_mode():
        made = make("llama")
        more = torch.nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="inference_mode"):
        offload(made, device="cpu")
    model = make("llama")
    with opened(model) as session:
        session.model(input_ids=tokens())
        session.model.more = more
        with pytest.raises(SessionError, match=r"more\.weight was made under torch\.inference_mode"):
            session.model(input_ids=tokens())
        del session.model.more
        session.model(input_ids=tokens())


def test_whoever_holds_the_lock_differentiates_in_its_own_thread():
    """On a card autograd has threads of its own, which would wait for the lock for ever."""
    lock = SharedLock()
    found = []

    def other():
        found.append(torch._C._is_multithreading_enabled())

    for outer in (True, False):
        with torch.autograd.set_multithreading_enabled(outer):
            with lock:
                assert not torch._C._is_multithreading_enabled()
                with lock:
                    assert not torch._C._is_multithreading_enabled()
                assert not torch._C._is_multithreading_enabled()
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            assert torch._C._is_multithreading_enabled() == outer
    assert found == [True, True]
