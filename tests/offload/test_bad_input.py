"""Bad input gets an error that says what to change, and leaves nothing half done."""

import json
import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralForCausalLM

import offload as package
from offload import (
    BudgetTooSmall,
    CheckpointChanged,
    CheckpointError,
    ConfigError,
    CorruptCheckpoint,
    DiskFolderError,
    DiskFull,
    MissingShard,
    ReadError,
    UnsupportedCheckpoint,
    offload,
)
from tests import processes
from tests.architectures import BY_NAME, make, oracle_of, tokens
from tests.budgets import NONE, budget_for, spec_of
from tests.processes import DEADLOCK_SECONDS

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    make("llama", True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    make("llama", True).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    return tmp_path / "shards"


def enter(target, **options):
    options.setdefault("device", "cpu")
    with offload(target, **options) as session:
        return session


def tight(target):
    return budget_for(spec_of(target), NONE, 2, 16)


def test_a_truncated_file(folder):
    os.truncate(folder / WEIGHTS, os.path.getsize(folder / WEIGHTS) - 10)
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        enter(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 100, b"\x10" + b"\x00" * 7 + b"not json at all!"])
def test_a_corrupt_header(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CorruptCheckpoint):
        enter(folder)


def test_sizes_that_do_not_fit_the_shape(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw.replace(b'"shape":[32]', b'"shape":[31]', 1))
    with pytest.raises(CorruptCheckpoint, match="its bytes are"):
        enter(folder)


def test_a_missing_shard(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(MissingShard, match=shards[1].name):
        enter(sharded)


def test_a_broken_index(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match="not a safetensors index"):
        enter(sharded)


def test_shards_are_read(sharded):
    model = make("llama", True)
    with offload(sharded, device="cpu", cpu_memory=tight(sharded), batch_size=2, max_tokens=16) as session:
        assert torch.equal(session.model(input_ids=tokens()).logits, oracle_of(model)(input_ids=tokens()).logits)


def test_weights_that_are_missing_are_not_made_up(folder):
    """transformers fills them with random numbers and goes on."""
    tensors = load_file(folder / WEIGHTS)
    tensors["stray"] = tensors.pop("model.layers.2.mlp.down_proj.weight")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors.*model\.layers\.2\.mlp\.down_proj\.weight"):
        enter(folder)


def test_a_config_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(CheckpointError, match=r"other shapes than config\.json says"):
        enter(folder)


def test_weights_that_are_not_used_are_told(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"stray": torch.zeros(3)}, folder / WEIGHTS, {"format": "pt"})
    with offload(folder, device="cpu") as session:
        assert any("stray" in sentence for sentence in session.report().fallbacks)


def test_spilling_to_memory_is_refused(monkeypatch):
    model = make("llama")
    monkeypatch.setattr("offload.storage.block_file._filesystem", lambda folder: "tmpfs")
    with pytest.raises(DiskFolderError, match="is in memory"):
        enter(model, cpu_memory=tight(model), batch_size=2, max_tokens=16)


def test_a_model_without_values():
    with torch.device("meta"):
        model = make("llama")
    with pytest.raises(ConfigError, match="meta device"):
        enter(model)


def test_an_unsupported_dtype(folder):
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw.replace(b'"dtype":"F32"', b'"dtype":"F4_"', 1))
    with pytest.raises(UnsupportedCheckpoint, match="dtype F4_"):
        enter(folder)


def test_pickled_weights_get_the_conversion_command(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"Convert once.*save_pretrained"):
        enter(folder)


def test_a_quantised_checkpoint_names_its_method(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpoint, match="quantised with gptq"):
        enter(folder)


def test_no_such_model(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder"):
        enter(tmp_path / "none")
    with pytest.raises(CheckpointError, match="the hub did not give"):
        enter("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        enter(tmp_path)


def test_the_least_budget_is_told_and_works(folder):
    with pytest.raises(BudgetTooSmall, match="Give a larger budget") as refusal:
        enter(folder, cpu_memory=1000, batch_size=2, max_tokens=16)
    with offload(folder, device="cpu", cpu_memory=refusal.value.least_bytes, batch_size=2, max_tokens=16) as session:
        session.model(input_ids=tokens())
    with pytest.raises(BudgetTooSmall):
        enter(folder, cpu_memory=refusal.value.least_bytes // 2, batch_size=2, max_tokens=16)


def test_what_cannot_fit_is_refused_before_loading(folder, monkeypatch):
    monkeypatch.setattr("offload.model.loading.CheckpointLoader.load", lambda *args: pytest.fail("it was loaded"))
    with pytest.raises(BudgetTooSmall, match=r"KV cache of 1 x 100000 tokens"):
        enter(folder, cpu_memory="50KiB", max_tokens=100_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu_memory": "lots"}, "is not a size"),
        ({"cpu_memory": 0}, "more than nothing"),
        ({"gpu_memory": "1GiB"}, "give cpu_memory only"),
        ({"device": "tpu"}, "is not known"),
        ({"device": "cuda:0"}, "no CUDA card"),
        ({"exactness": "roughly"}, "is not known"),
        ({"dtype": "int8"}, "floating-point"),
        ({"dtype": "float12"}, "is not a dtype"),
        ({"device_map": "auto"}, "device_map= of from_pretrained cannot be given"),
    ],
)
def test_a_request_that_cannot_be_met(folder, options, message):
    if options.get("device", "").startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(ConfigError, match=message):
        enter(folder, **options)


def test_loading_options_for_a_model_that_exists():
    with pytest.raises(ConfigError, match="given by its path"):
        enter(make("llama", True), dtype="bfloat16")


@pytest.mark.parametrize("change", ["truncate", "rewrite", "overwrite"])
def test_a_file_that_changes_underneath(folder, change):
    with offload(folder, device="cpu", cpu_memory=tight(folder), batch_size=2, max_tokens=16) as session:
        session.model(input_ids=tokens())
        if change == "truncate":
            os.truncate(folder / WEIGHTS, 4096)
        elif change == "overwrite":
            other_weights(folder / WEIGHTS)
        else:
            os.utime(folder / WEIGHTS, ns=(1, 1))
        with pytest.raises(CheckpointChanged, match="while its weights were in use"):
            session.model(input_ids=tokens())


def other_weights(path):
    """Overwritten in place, with the time of the last write set back."""
    before = os.stat(path)
    content = {name: value * 2 for name, value in load_file(path).items()}
    other = path.with_suffix(".other")
    save_file(content, other, {"format": "pt"})
    assert other.stat().st_size == before.st_size
    with open(path, "r+b") as file:
        file.write(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino, path.stat().st_mtime_ns) == (
        before.st_size,
        before.st_ino,
        before.st_mtime_ns,
    )


def test_converted_weights_of_a_file_that_was_overwritten_are_not_used_again(tmp_path):
    model = make("mixtral", True)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()

    def logits():
        options = {"device": "cpu", "cpu_memory": "1MiB", "batch_size": 2, "max_tokens": 16}
        with offload(tmp_path / "model", disk_dir=tmp_path / "disk", **options) as session, torch.no_grad():
            return session.model(input_ids=tokens()).logits.clone()

    before = logits()
    other_weights(tmp_path / "model" / WEIGHTS)
    after = logits()
    assert not torch.equal(before, after)
    assert torch.equal(after, MixtralForCausalLM.from_pretrained(tmp_path / "model").eval()(input_ids=tokens()).logits)


def test_a_read_error_in_the_middle_of_generation(folder, monkeypatch):
    wanted = oracle_of(make("llama", True))(input_ids=tokens()).logits
    with offload(folder, device="cpu", cpu_memory=tight(folder), batch_size=2, max_tokens=16) as session:
        session.model(input_ids=tokens())
        real = os.preadv
        calls = []

        def fail(*args):
            calls.append(1)
            if len(calls) > 12:
                raise OSError(5, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", fail)
            with pytest.raises(ReadError, match="Input/output error"):
                session.model.generate(tokens(), max_new_tokens=9, do_sample=False)
        assert torch.equal(session.model(input_ids=tokens()).logits, wanted), "the session is usable afterwards"


def test_no_such_disk_folder(folder, tmp_path):
    with pytest.raises(DiskFolderError, match="does not exist"):
        enter(folder, disk_dir=tmp_path / "none")


def test_a_full_disk_while_spilling_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = make("llama", True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budget = tight(model)
    real, calls = os.pwrite, []

    def full(*args):
        calls.append(1)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match="is full"):
            enter(model, cpu_memory=budget, batch_size=2, max_tokens=16, disk_dir=tmp_path)
    assert not os.listdir(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(model(input_ids=tokens()).logits, oracle_of(make("llama", True))(input_ids=tokens()).logits)


def test_too_little_disk_is_told_before_writing(tmp_path, monkeypatch):
    model = make("llama", True)
    budget = tight(model)
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: type("Full", (), {"f_bavail": 1, "f_frsize": real.f_frsize}))
    with pytest.raises(DiskFull, match=r"has 4\.0 KiB free"):
        enter(model, cpu_memory=budget, batch_size=2, max_tokens=16, disk_dir=tmp_path)


def _run_mixtral(folder, disk, threads, results):
    # Sums are taken in another order with another number of threads, on some processors.
    torch.set_num_threads(threads)
    options = {"batch_size": 2, "max_tokens": 16, "disk_dir": disk, "expert_policy": "layers"}
    with offload(folder, device="cpu", cpu_memory=tight(folder) * 2, **options) as session:
        results.put(session.model(input_ids=tokens()).logits.sum().item())


def test_two_processes_share_a_disk_folder(tmp_path):
    model = make("mixtral", True)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    context = processes.context()
    results = context.Queue()
    arguments = (str(tmp_path / "model"), str(tmp_path / "disk"), torch.get_num_threads(), results)
    both = [context.Process(target=_run_mixtral, args=arguments) for _ in range(2)]
    for process in both:
        process.start()
    sums = [results.get(timeout=DEADLOCK_SECONDS) for _ in both]
    for process in both:
        process.join()
        assert process.exitcode == 0
    wanted = oracle_of(model)(input_ids=tokens()).logits.sum().item()
    assert sums == [wanted, wanted]
    assert [name.endswith(".blocks") for name in os.listdir(tmp_path / "disk")] == [True]


def test_the_leftovers_of_a_killed_process(tmp_path):
    model = make("mixtral", True)
    model.save_pretrained(tmp_path / "model")
    disk = tmp_path / "disk"
    disk.mkdir()
    key = "0123456789abcdef" * 2
    (disk / f"{key}.a1b2c3d4.offload-partial").write_bytes(b"half")
    others = {
        "film.mkv.partial": b"a download of another program",
        f"{key}.partial": b"named as ours were once",
        "notes.offload-partial": b"no key",
        f"x{key}.a1b2c3d4.offload-partial": b"more before the key",
    }
    for name, content in others.items():
        (disk / name).write_bytes(content)
    (tmp_path / "elsewhere").write_bytes(b"linked")
    link = disk / f"{key}.e5f6a7b8.offload-partial"
    link.symlink_to(tmp_path / "elsewhere")
    wanted = oracle_of(model)(input_ids=tokens()).logits
    for _ in range(2):
        with offload(
            tmp_path / "model", device="cpu", cpu_memory="1MiB", batch_size=2, max_tokens=16, disk_dir=disk
        ) as session:
            assert torch.equal(session.model(input_ids=tokens()).logits, wanted)
    kept = {name for name in os.listdir(disk) if not name.endswith(".blocks")}
    assert kept == {*others, link.name}
    assert all((disk / name).read_bytes() == content for name, content in others.items())
    assert link.read_bytes() == b"linked"
    assert len(os.listdir(disk)) == len(kept) + 1


def test_nothing_in_a_shared_folder_is_deleted(tmp_path, monkeypatch):
    """Where no folder was named for it, what is converted has no name, and nobody's files are looked at."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = make("mixtral", True)
    model.save_pretrained(tmp_path / "model")
    names = ["film.partial", "0123456789abcdef0123456789abcdef.a1b2c3d4.offload-partial", "states-ab-c.bin"]
    for name in names:
        (tmp_path / name).write_bytes(b"somebody's")
    with offload(tmp_path / "model", device="cpu", cpu_memory="1MiB", batch_size=2, max_tokens=16) as session:
        session.model(input_ids=tokens())
        assert sorted(os.listdir(tmp_path)) == sorted([*names, "model"])
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "model"])


def test_another_model_under_the_same_path_is_not_mistaken(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    for seed in (0, 1):
        model = make("mixtral", True, seed=seed)
        model.save_pretrained(tmp_path / "model")
        with offload(
            tmp_path / "model", device="cpu", cpu_memory="1MiB", batch_size=2, max_tokens=16, disk_dir=disk
        ) as session:
            assert torch.equal(session.model(input_ids=tokens()).logits, oracle_of(model)(input_ids=tokens()).logits)


def test_a_converted_dtype_is_what_transformers_converts_to(folder, tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "disk").mkdir()
    twin = oracle_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    for _ in range(2):
        with offload(
            folder, device="cpu", cpu_memory="400KB", batch_size=2, max_tokens=16, dtype="bfloat16", disk_dir=tmp_path / "disk"
        ) as session:
            assert session.model.dtype == torch.bfloat16
            assert torch.equal(session.model(input_ids=tokens()).logits, twin(input_ids=tokens()).logits)


def test_renamed_keys(folder):
    stored = load_file(folder / WEIGHTS)
    save_file({name.removeprefix("model."): value for name, value in stored.items()}, folder / WEIGHTS, {"format": "pt"})
    wanted = oracle_of(make("llama", True))(input_ids=tokens()).logits
    with offload(folder, device="cpu", cpu_memory="400KB", batch_size=2, max_tokens=16) as session:
        assert torch.equal(session.model(input_ids=tokens()).logits, wanted)


def test_elsewhere_than_on_linux(folder, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(package.PlatformError, match="Linux only"):
        enter(folder)


def _generate_until_killed(folder, ready):
    with offload(folder, device="cpu", cpu_memory=tight(folder), batch_size=2, max_tokens=16) as session:
        ready.set()
        while True:
            session.model(input_ids=tokens())


def test_a_killed_process_does_not_hang(folder):
    context = processes.context()
    ready = context.Event()
    process = context.Process(target=_generate_until_killed, args=(str(folder), ready))
    process.start()
    assert ready.wait(DEADLOCK_SECONDS)
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join(DEADLOCK_SECONDS)
    assert process.exitcode == -signal.SIGTERM


def test_inputs_that_do_not_exist_raise_as_they_do_without_us(folder):
    with offload(folder, device="cpu", cpu_memory="100KB", max_tokens=4) as session:
        for wrong in (10_000, -1):
            with pytest.raises(IndexError):
                session.model(input_ids=torch.tensor([[wrong]]))


def test_threads_end_when_the_main_thread_fails(folder):
    with pytest.raises(ZeroDivisionError), offload(folder, device="cpu", cpu_memory="1MiB", max_tokens=16):
        raise ZeroDivisionError
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("offload-")]


def test_every_error_is_ours():
    errors = [value for value in vars(package).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) > 10
    assert all(issubclass(error, package.OffloadError) for error in errors)
    assert "mixtral" in BY_NAME


def with_header(path, change):
    """Write the file again with another header; the tensors' bytes stay."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = change(json.loads(content[8 : 8 + length]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def entry_with(**fields):
    def change(header):
        name = next(key for key in header if key != "__metadata__")
        return header | {name: header[name] | fields}

    return change


HEADERS = {
    "strings for offsets": entry_with(data_offsets=["0", "8"]),
    "one offset": entry_with(data_offsets=[0]),
    "negative offsets": entry_with(data_offsets=[-8, 0]),
    "fractions": entry_with(shape=[1.5, 2]),
    "a huge shape": entry_with(shape=[10**30, 10**30]),
    "no dtype": entry_with(dtype=None),
    "truth for a size": entry_with(shape=[True]),
    "an entry that is none": lambda header: header | {next(key for key in header if key != "__metadata__"): 3},
    "overlapping": lambda header: header | {"one.more": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "a hole": lambda header: dict(list(header.items())[:1] + list(header.items())[2:]),
    "deep JSON": lambda header: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda header: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "not text": lambda header: b"\xff\xfe{}",
    "a list": lambda header: [],
}


@pytest.mark.parametrize("what", list(HEADERS))
def test_a_damaged_header_is_one_sentence(what, folder):
    with_header(folder / WEIGHTS, HEADERS[what])
    with pytest.raises(CheckpointError) as refused:
        enter(str(folder))
    assert WEIGHTS in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bytes_behind_the_last_tensor(folder):
    with open(folder / WEIGHTS, "ab") as file:
        file.write(b"more")
    with pytest.raises(CorruptCheckpoint, match="longer than that"):
        enter(str(folder))


def test_a_pointer_of_git_lfs(folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CorruptCheckpoint, match="git lfs pull"):
        enter(str(folder))


@pytest.mark.parametrize("index", ['{"weight_map": {"a": 3}}', '{"weight_map": [1]}', '{"weight_map": null}', "[" * 100_000])
def test_a_damaged_index_is_one_sentence(index, sharded):
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CorruptCheckpoint, match="is not a safetensors index"):
        enter(str(sharded))


def test_shards_without_their_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedCheckpoint, match=r"safetensors files .* nor model\.safetensors\.index\.json"):
        enter(str(sharded))


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("adapter_config.json", "adapter_config.json cannot be used"),
        ("model_index.json", "diffusers pipeline"),
        ("model.Q4_0.gguf", "as a GGUF file"),
        ("readme.md", "no config.json"),
    ],
)
def test_folders_that_are_something_else_are_named(file, said, tmp_path):
    (tmp_path / file).write_text("{}")
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=said):
        enter(str(tmp_path))


def test_a_folder_in_place_of_a_shard(folder):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        enter(str(folder))
