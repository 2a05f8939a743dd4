"""What transformers' converters produce while a checkpoint is loaded: cast and merged tensors, which lie in no file."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import core_model_loading as converters

from offload.model.expert_loading import SingleExperts
from offload.model.homes import FileMaps
from offload.storage.block_file import BlockFile, BlockFileWriter, check_folder, spill_folder
from offload.storage.host_buffer import release_freed_memory


class Conversions:
    """While active, what transformers' converters produce goes to a block file at once instead of staying in memory.

    A converter's result is left alone where it is a view of a checkpoint file. A stand-in that takes no memory is put
    into the model in place of the others, and replaced by a view of the block file after loading.
    """

    def __init__(self, key: str, disk_dir: str | None, progress: Callable[[int], None], singles: SingleExperts) -> None:
        if disk_dir is not None:
            check_folder(disk_dir)
        self._key = key
        self._disk_dir = disk_dir
        self._progress = progress
        self._singles = singles
        self._kept = BlockFile.open(disk_dir, key) if disk_dir is not None else None
        self._writer: BlockFileWriter | None = None
        self._maps = FileMaps()
        self._thread = threading.get_ident()
        self._converted = False
        """The mapping before made tensors in memory, which are in a file by now."""
        self._originals: list[tuple[Any, Any]] = []

    def __enter__(self) -> None:
        kinds: list[Any] = [converters.WeightConverter, converters.WeightRenaming]
        for kind in kinds:
            self._originals.append((kind, kind.convert))
            kind.convert = self._wrap(kind.convert)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for owner, original in self._originals:
            owner.convert = original
        if error is not None and self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def finish(self) -> BlockFile | None:
        """The file with the converted tensors; None if nothing had to be converted."""
        if self._kept is not None:
            return self._kept
        if self._writer is None:
            return None
        try:
            return self._writer.finish()
        except BaseException:
            self._writer.abandon()
            raise

    def _wrap(self, original: Any) -> Any:
        def convert(mapping: Any, layer_name: str, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._thread:
                return original(mapping, layer_name, *args, **kwargs)
            if self._kept is not None and layer_name in self._kept.groups:
                mapping.collected_tensors.clear()
                return {name: self._kept.view(name) for name in self._kept.groups[layer_name]}
            if self._converted:
                # What that took; a view of a file takes nothing, and threads that read weights hold up each such call.
                release_freed_memory()
            self._converted = converts = isinstance(mapping, converters.WeightConverter)
            if converts and self._kept is None and self._singles.takes(layer_name, mapping):
                # Without the place where errors are noted: an attempt that fails is none.
                quiet = {**kwargs, "loading_info": None}
                return self._in_singles(layer_name, mapping, lambda taken: original(taken, layer_name, *args, **quiet))
            return self._spilled(layer_name, original(mapping, layer_name, *args, **kwargs), kwargs.get("model"))

        return convert

    def _in_singles(self, layer_name: str, mapping: Any, run: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        found = self._singles.locate(layer_name, mapping, run)
        if found is None:
            found = self._singles.write(layer_name, mapping, run, self._opened_writer())
            self._progress(self._opened_writer().nbytes)
        return found

    def _opened_writer(self) -> BlockFileWriter:
        if self._writer is None:
            self._writer = BlockFileWriter(self._disk_dir or spill_folder(), self._key if self._disk_dir else None)
        return self._writer

    def _spilled(self, layer_name: str, results: dict[str, Any], model: Any) -> dict[str, Any]:
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in results.items()}
        parameters = {name for name in tensors if _is_parameter(model, name)}
        on_disk = all(self._on_disk(value) for value in tensors.values())
        if self._kept is not None or on_disk or parameters != set(tensors):
            return results
        self._converted = True
        writer = self._opened_writer()
        placeholders = {}
        for name, value in tensors.items():
            writer.add(name, value, layer_name)
            self._progress(writer.nbytes)
            placeholders[name] = torch.empty(1, dtype=value.dtype).expand(value.shape)
        return placeholders

    def _on_disk(self, tensor: torch.Tensor) -> bool:
        if self._maps.locate(tensor) is not None:
            return True
        # Another shard was opened since, or it is converted.
        self._maps = FileMaps()
        return self._maps.locate(tensor) is not None


def _is_parameter(model: Any, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True
