"""What a quantised checkpoint holds, and a model's parameters made of it: views of files, and stand-ins."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from offload.model.blocks import StoredSize
from offload.model.placeholders import placeholder
from offload.storage.blocks import BLOCK_ALIGNMENT_BYTES, align_up
from offload.storage.checkpoint import StoredTensor
from offload.storage.codecs.decode_speed import CODECS, decoded_bytes_per_second
from offload.storage.codecs.weights import EncodedTensor, Source
from offload.storage.errors import UnsupportedCheckpoint
from offload.storage.load_plan import plan_load
from offload.storage.native.library import compiler, library


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The tensors of a checkpoint, by the names that the model's own loading gives them.

    Attributes:
        plain: bytes that are the values.
        encoded: bytes that the values are decoded from.
        unused: names of tensors that no parameter is made of.
    """

    plain: Mapping[str, StoredTensor]
    encoded: Mapping[str, EncodedTensor]
    unused: tuple[str, ...] = ()

    def source_of(self, name: str) -> Source | None:
        """Where the tensor of that name is; None if it is of another name here."""
        if name in self.plain:
            return self.plain[name].range
        return self.encoded.get(name)

    @property
    def sources(self) -> frozenset[str]:
        """The files that they are in."""
        ranges = [item.range for item in self.plain.values()]
        return frozenset(item.path for item in (*ranges, *(part for one in self.encoded.values() for part in one.parts)))


@dataclass(slots=True)
class ModelState:
    """Tensors that a model is loaded from, and which of its parameters became what.

    Args:
        weights: the checkpoint's.
    """

    weights: StoredWeights
    tensors: dict[str, torch.Tensor] = field(init=False)
    _placeholders: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        views = FileViews()
        self.tensors = {name: views.of(item) for name, item in self.weights.plain.items()}
        placeholders = {
            name: placeholder(item.spec.shape, getattr(torch, item.spec.dtype)) for name, item in self.weights.encoded.items()
        }
        self._placeholders = {_memory(tensor): name for name, tensor in placeholders.items()}
        self.tensors |= placeholders

    def found_in(self, model: nn.Module) -> dict[str, EncodedTensor]:
        """What each parameter is decoded from that has a stand-in, by its name in the model.

        Raises:
            UnsupportedCheckpoint: if the model's loading computed with a stand-in: its values would be lost.
        """
        found, known = {}, set()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            stored = self._placeholders.get(_memory(parameter.data))
            if stored is None:
                continue
            encoded = self.weights.encoded[stored]
            if tuple(parameter.shape) != encoded.spec.shape or parameter.dtype != getattr(torch, encoded.spec.dtype):
                raise UnsupportedCheckpoint(
                    f"{name} is {parameter.dtype}{list(parameter.shape)} in the model, and {stored} is decoded to "
                    f"{encoded.spec.dtype}{list(encoded.spec.shape)}: this model's weights are converted, which cannot be "
                    "done to encoded ones yet. Use the unquantised checkpoint."
                )
            found[name] = encoded
            known.add(stored)
        if lost := sorted(set(self.weights.encoded) - known):
            raise UnsupportedCheckpoint(
                f"{len(lost)} encoded weights, such as {lost[0]}, became no parameter of the model as they are: this model's "
                "weights are converted, which cannot be done to encoded ones yet. Use the unquantised checkpoint."
            )
        return found


class FileViews:
    """Private views of files: no memory until they are read."""

    def __init__(self) -> None:
        self._storages: dict[str, Any] = {}

    def of(self, item: StoredTensor) -> torch.Tensor:
        place, dtype = item.range, getattr(torch, item.spec.dtype)
        if not place.nbytes:
            return torch.empty(item.spec.shape, dtype=dtype)
        if place.path not in self._storages:
            self._storages[place.path] = torch.UntypedStorage.from_file(place.path, False, os.path.getsize(place.path))
        content = torch.empty(0, dtype=torch.uint8).set_(self._storages[place.path][place.offset : place.end])
        return content.view(dtype).view(item.spec.shape)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def size_of_sources(sources: Sequence[Source], unit_bytes: int = BLOCK_ALIGNMENT_BYTES) -> StoredSize:
    """What a block takes that is made of these.

    Args:
        unit_bytes: that files are read in.
    """
    load_plan = plan_load(sources, unit_bytes)
    encoded = [source for source in sources if isinstance(source, EncodedTensor)]
    largest = max(encoded, key=lambda source: source.nbytes, default=None)
    if largest is None:
        return StoredSize(load_plan.slot_bytes, load_plan.payload_bytes)
    seconds = sum(item.nbytes / decoded_bytes_per_second(item.codec.name, item.spec.dtype) for item in encoded)
    whole_pages = align_up(load_plan.stored.slot_bytes, BLOCK_ALIGNMENT_BYTES)
    return StoredSize(load_plan.slot_bytes, load_plan.payload_bytes, largest.codec.name, seconds, whole_pages)


def decoding_notes(codecs: Collection[str]) -> Iterator[str]:
    """What would make decoding faster here.

    Args:
        codecs: of the blocks that are streamed.
    """
    named = sorted(set(codecs) & set(CODECS))
    if named and library() is None and compiler() is not None:
        yield f"torch decodes the weights ({', '.join(named)}): `offload native build` makes that several times as fast"
