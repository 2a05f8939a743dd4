"""Checkpoints of training: what is trained, the optimizer's states, and how far it was.

    states-*.bin       being written, gone with the process that writes it
    checkpoint-*.bin   a further name of such a file once it is whole and will not be written to
    training.json      names it; renamed into place last, so that it always names a whole one

The states on NVMe are the checkpoint: the next step writes beside them. States in CPU memory are written while the next
forward and backward run, each sub-group before its next update (DataStates, arXiv 2406.10707).
"""

import base64
import json
import os
import threading
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.training.managed import ManagedTraining
from offload.training.states import Frozen
from storage.errors import ConfigError, CorruptCheckpoint
from storage.state_file import StateFile, remove_unlocked

MANIFEST = "training.json"
_VERSION = 1
_SAMPLES = 64
_SAMPLE_BYTES = 4096


class Checkpoints:
    """Writes the checkpoints of one training, each in place of the last.

    Args:
        folder: of the manifest; made if need be.
        model: identity of what is trained, as `identity_of` tells it.
    """

    def __init__(self, folder: str | Path, managed: ManagedTraining, model: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{folder} is a file; name a folder for checkpoints")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._managed = managed
        self._model = dict(model)
        self._last: Frozen | None = None
        self._last_path: str | None = None
        self._saving: threading.Thread | None = None
        self._done: tuple[Frozen, str] | None = None
        self._error: BaseException | None = None

    def save(self, progress: Mapping[str, Any]) -> None:
        """Begin to write one; the last one stays until it is whole.

        Raises:
            DiskFull: if there is no room; the last one stays.
            Whatever went wrong with the one before.
        """
        self.wait()
        frozen = self._managed.states.freeze()
        path = _checkpoint_path(frozen.file.path)
        manifest = {
            "version": _VERSION,
            "states": os.path.abspath(path),
            "bytes": self._managed.layout.nbytes,
            "model": self._model,
            "optimizer": self._managed.settings(),
            "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "progress": dict(progress),
        }
        self._saving = threading.Thread(target=self._finish, args=(frozen, path, manifest), name="offload-checkpoint")
        self._saving.start()
        if frozen.written:
            self.wait()

    def wait(self) -> None:
        """Return when the last one is whole."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._done is not None:
            self._replace_last(*self._done)
            self._done = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the last one, and let go of its file."""
        try:
            self.wait()
        finally:
            if self._last is not None:
                self._last.leave()
                self._last = None

    def resume(self) -> dict[str, Any] | None:
        """Take training up where the folder's checkpoint left it; None if there is none.

        Returns:
            The progress that it was saved with.

        Raises:
            CorruptCheckpoint: if it is not whole.
            ConfigError: if it is of another model, or of an optimizer of another kind.
        """
        manifest = read_manifest(self.folder)
        if manifest is None:
            return None
        compare("model", manifest["model"], self._model)
        compare("optimizer", manifest["optimizer"]["kind"], self._managed.settings()["kind"])
        path = manifest["states"]
        if not os.path.isfile(path) or os.path.getsize(path) < manifest["bytes"]:
            raise CorruptCheckpoint(f"{path}, which {self.folder / MANIFEST} names, is gone or cut short")
        self._managed.run = _run_of(path)
        self._last = self._managed.resume(self._adopted(path, manifest["bytes"]), manifest["optimizer"])
        self._last_path = path
        _remove_others(path)
        torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(manifest["random"])), dtype=torch.uint8))
        return dict(manifest["progress"])

    def _adopted(self, path: str, nbytes: int) -> StateFile:
        """The checkpoint's file under a further name, which goes when this process does."""
        name = self._managed.new_name()
        os.unlink(name)
        os.link(path, name)
        return StateFile(name, nbytes)

    def _finish(self, frozen: Frozen, path: str, manifest: dict[str, Any]) -> None:
        try:
            frozen.wait()
            if os.path.exists(path):
                os.unlink(path)
            os.link(frozen.file.path, path)
            _write_manifest(self.folder, manifest)
        except BaseException as error:  # handed to whoever saves or waits next
            self._error = error
            return
        self._done = frozen, path

    def _replace_last(self, frozen: Frozen, path: str) -> None:
        if self._last_path is not None and self._last_path != path and os.path.exists(self._last_path):
            os.unlink(self._last_path)
        if self._last is not None:
            self._last.release()
        self._last, self._last_path = frozen, path


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if the folder has none.

    Raises:
        CorruptCheckpoint: if it cannot be read.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise ValueError(f"its version is {manifest['version']}, and this is {_VERSION}")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CorruptCheckpoint(f"{path} is no manifest of a training ({error})") from error
    return manifest


def identity_of(model: nn.Module, files: Iterable[str]) -> dict[str, Any]:
    """What tells a model from another: its parameters' names and shapes, and samples of its files."""
    listed = [(name, list(value.shape), str(value.dtype), value.requires_grad) for name, value in model.named_parameters()]
    return {
        "parameters": zlib.crc32(json.dumps(listed).encode()),
        "files": {os.path.basename(path): _sampled(path) for path in sorted(files)},
    }


def compare(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names what differs."""
    different = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if different:
        changes = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in different[:4])
        raise ConfigError(
            f"the checkpoint was made with another {what}: {changes}. Give what was given then, or start anew in another folder"
        )


def _sampled(path: str) -> list[int]:
    """Size and checksum of a few pages of a file."""
    size = os.path.getsize(path)
    total = 0
    with open(path, "rb") as file:
        for index in range(_SAMPLES):
            file.seek(size * index // _SAMPLES)
            total = zlib.crc32(file.read(_SAMPLE_BYTES), total)
    return [size, total]


def _checkpoint_path(states_path: str) -> str:
    folder, name = os.path.split(states_path)
    return os.path.join(folder, name.replace("states-", "checkpoint-", 1))


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    partial = folder / f"{MANIFEST}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MANIFEST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_others(path: str) -> None:
    """Checkpoints of the same training that were not named any more, or not yet, when it was killed."""
    folder = os.path.dirname(path)
    for name in os.listdir(folder):
        found = os.path.join(folder, name)
        if found != path and name.startswith("checkpoint-") and _run_of(found) == _run_of(path):
            remove_unlocked(found)


def _run_of(path: str) -> str:
    """Which training a file of states belongs to."""
    return "".join(os.path.basename(path).split("-")[1:2])
