"""Checkpoints of training: what is trained, optimizer state, and how far it was.

    training.json                names the other, says how far training was, and what the other's checksums are
    offload-checkpoint-*.bin     weights and states, whole, and never written to again

The folder is self-contained: a copy of it is a backup, and a moved one is resumed. The manifest is renamed into place last, so
that it always names a whole file.

The states on NVMe are the checkpoint: their file gets a name, and the next step writes another one. States in CPU memory are
written while the next forward and backward run, each sub-group before its next update (DataStates, arXiv 2406.10707).
"""

import base64
import copy
import fcntl
import json
import os
import re
import secrets
import threading
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from offload.storage.errors import ConfigError, CorruptCheckpoint, OffloadError, foreign_file
from offload.storage.fingerprint import fingerprint_of
from offload.storage.whole_file import is_partial_of, replace_text
from offload.training.optimizer.states import StateSnapshot
from offload.training.optimizer.streamed_optimizer import StreamedTraining

MANIFEST = "training.json"
_VERSION = 2
_STATES_NAME = re.compile(r"offload-checkpoint-[0-9a-f]{16}\.bin")


class Checkpoints:
    """Writes the checkpoints of one training, each in place of the last.

    Args:
        folder: made if need be. Nobody else may write checkpoints there meanwhile.
        model: identity of what is trained, as `identity_of` tells it.

    Attributes:
        copied: the folder is on another filesystem than the states, which are copied there.

    Raises:
        ConfigError: if it is no folder, or in use.
    """

    def __init__(self, folder: str | Path, training_state: StreamedTraining, model: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"{folder} is a file; name a folder for checkpoints")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.copied = False
        self._managed = training_state
        self._model = dict(model)
        self._last: StateSnapshot | None = None
        self._saving: threading.Thread | None = None
        self._done: StateSnapshot | None = None
        self._failed: StateSnapshot | None = None
        self._error: BaseException | None = None
        self._descriptor = _locked(self.folder)

    def save(self, progress: Mapping[str, Any]) -> None:
        """Begin to write one; the last one stays until it is whole.

        Raises:
            DiskFull: if there is no room; the last one stays.
            Whatever went wrong with the one before.
        """
        self.wait()
        frozen = self._managed.states.snapshot(partial(self._managed.new_file, str(self.folder)))
        manifest = {
            "version": _VERSION,
            "bytes": self._managed.layout.nbytes,
            "model": self._model,
            "optimizer": self._managed.settings(),
            "random": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
            "progress": progress,
        }
        # As all of it is now: it is written when training has gone on.
        manifest = copy.deepcopy(manifest)
        self._saving = threading.Thread(target=self._finish, args=(frozen, manifest), name="offload-checkpoint")
        self._saving.start()
        if frozen.written:
            self.wait()

    def wait(self) -> None:
        """Return when the last one is whole."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._done is not None:
            before, self._last, self._done = self._last, self._done, None
            if before is not None:
                before.release()
        if self._failed is not None:
            self._failed.release()
            self._failed = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for the last one, and let go of the folder."""
        try:
            self.wait()
        finally:
            if self._last is not None:
                self._last.release()
                self._last = None
            os.close(self._descriptor)

    def resume(self) -> dict[str, Any] | None:
        """Take training up where the folder's checkpoint left it; None if there is none.

        Returns:
            The progress that it was saved with.

        Raises:
            CorruptCheckpoint: if it is not whole, or a byte of it is not what was written.
            ConfigError: if it is of another model, or of an optimizer of another kind.
        """
        manifest = read_manifest(self.folder)
        if manifest is None:
            return None
        with foreign_file(f"{self.folder / MANIFEST} is no manifest of a training", CorruptCheckpoint):
            compare("model", manifest["model"], self._model)
            compare("optimizer", manifest["optimizer"]["kind"], self._managed.settings()["kind"])
            self._last = self._resumed(self.folder / manifest["states"], manifest)
            _remove_others(self.folder, manifest["states"])
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(manifest["random"])), dtype=torch.uint8))
            return dict(manifest["progress"])

    def _resumed(self, path: Path, manifest: Mapping[str, Any]) -> StateSnapshot:
        """The states as they were, and the weights that follow from them."""
        nbytes = manifest["bytes"]
        if not path.is_file() or path.stat().st_size < nbytes or nbytes != self._managed.layout.nbytes:
            raise CorruptCheckpoint(f"{path}, which {self.folder / MANIFEST} names, is gone or cut short")
        file = self._managed.open_file(str(path))
        try:
            if file.checksums(nbytes) != manifest["checksums"]:
                raise CorruptCheckpoint(
                    f"{path} fails its checksum: it is not what was written. Resume from a copy, or begin anew"
                )
        except OffloadError:
            self._managed.drop_file(file)
            raise
        return self._managed.resume(file, manifest["optimizer"])

    def _finish(self, frozen: StateSnapshot, manifest: dict[str, Any]) -> None:
        name = f"offload-checkpoint-{secrets.token_hex(8)}.bin"
        try:
            frozen.wait()
            manifest |= {"states": name, "checksums": frozen.file.checksums(manifest["bytes"])}
            self.copied = not frozen.file.link(str(self.folder / name)) or self.copied
            manifest["checksum"] = _checksum(manifest)
            replace_text(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        except BaseException as error:  # handed to whoever saves or waits next
            (self.folder / name).unlink(missing_ok=True)
            self._failed, self._error = frozen, error
            return
        _remove_others(self.folder, name)
        self._done = frozen


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None if the folder has none.

    Raises:
        CorruptCheckpoint: if it cannot be read, or names a file that is not one of the folder's checkpoints.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != _VERSION:
            raise ValueError(f"its version is {manifest['version']}, and this is {_VERSION}")
        if not _STATES_NAME.fullmatch(manifest["states"]):
            raise ValueError(f"the states that it names, {manifest['states']!r}, are no file that is written here")
        # Older ones have none.
        if manifest.get("checksum", _checksum(manifest)) != _checksum(manifest):
            raise ValueError("it fails its checksum: it is not what was written")
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} is no manifest of a training ({error})") from error
    return manifest


def _checksum(manifest: Mapping[str, Any]) -> int:
    """Sum up all but the checksum."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def identity_of(model: nn.Module, files: Iterable[str]) -> dict[str, Any]:
    """What tells a model from another: its parameters' names and shapes, and samples of its files."""
    listed = [(name, list(value.shape), str(value.dtype), value.requires_grad) for name, value in model.named_parameters()]
    return {
        "parameters": zlib.crc32(json.dumps(listed).encode()),
        "files": {os.path.basename(path): fingerprint_of(path) for path in sorted(files)},
    }


def compare(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError, which names what differs."""
    different = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
    if different:
        changes = ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}" for name in different[:4])
        raise ConfigError(
            f"the checkpoint was made with another {what}: {changes}. Give what was given then, or start anew in another folder"
        )


def _locked(folder: Path) -> int:
    """A descriptor of the folder that holds its lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise ConfigError(f"another training writes its checkpoints to {folder}; name another folder") from error
    except OSError:
        # A filesystem without locks.
        pass
    return descriptor


def _remove_others(folder: Path, kept: str) -> None:
    """Delete checkpoints that the manifest does not name any more, and what a process left that was killed."""
    for entry in os.scandir(folder):
        ours = _STATES_NAME.fullmatch(entry.name) or is_partial_of(entry.name, MANIFEST)
        if ours and entry.name != kept and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)
