"""From a checkpoint folder or a hub id to a model whose parameters are views of files: loaded without being read."""

import contextlib
import copy
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from offload.config import Progress
from offload.model.blocks import StoredSize, Unit, estimated_size, tensor_spec
from offload.model.checkpoint_folder import DEMO, fetch_headers, find_folder
from offload.model.conversions import Conversions
from offload.model.expert_loading import SingleExperts
from offload.model.experts import ExpertPieces
from offload.model.from_pretrained import AS_IT_IS, LoadingOptions, read_config
from offload.model.loading_settings import bar_off, threads_off
from offload.model.quantised.encoding import Forms, as_found, encoded_weights, expected_source, forms_of
from offload.model.quantised.gguf import GgufFile
from offload.model.quantised.gguf_files import SUFFIX, parts_of
from offload.model.quantised.gguf_metadata import metadata_folder
from offload.model.quantised.methods import READERS
from offload.model.quantised.weights import FileViews, ModelState, StoredWeights, size_of_sources
from offload.storage.block_file import BlockFile, key_of
from offload.storage.checkpoint import cache_first_pages, dtypes_of, identity, read_checkpoint
from offload.storage.codecs.weights import Source
from offload.storage.errors import CheckpointError, ConfigError, CorruptCheckpoint, UnsupportedCheckpoint, foreign_file

_LAYER_COUNTS = {
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
}
"""Each layer has a tensor at least."""

_LARGEST_COUNT = 1 << 40
"""No size of a model is above it."""
_OF_THE_CONFIG = ("attn_implementation", "experts_implementation")
_LAYOUT_VERSION = 1

_loading = threading.Lock()
"""transformers' converters are wrapped while a model loads: one model at a time."""


@dataclass(slots=True)
class LoadedModel:
    """A model from a checkpoint, and the files that its parameters are views of.

    Attributes:
        places: where tensors lie that were converted, by parameter name, or what they are decoded from; all others lie in the
            checkpoint's own files.
        experts: where the experts of parameters lie that no file holds as they are, by parameter name; the parameters are
            stand-ins then.
        fallbacks: a sentence for each thing that was slower than it could be.
        outline: the model without values; None where there is none.
    """

    model: nn.Module
    places: dict[str, Source]
    experts: dict[str, ExpertPieces] = field(default_factory=dict)
    files: list[BlockFile] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    outline: nn.Module | None = None


def find_outline(name: str, options: LoadingOptions = AS_IT_IS) -> "CheckpointLoader":
    """A loader to look at: of a hub id nothing but the config and the safetensors headers is fetched.

    Raises:
        CheckpointError: if there is no such folder and the hub does not give it.
    """
    if name == DEMO or os.path.exists(name) or options.gguf_file is not None:
        return CheckpointLoader(find_folder(name, options), options)
    folder, headers = fetch_headers(name)
    return CheckpointLoader(folder, options, headers)


def _counts(content: Any) -> Iterator[tuple[str, int]]:
    for name, value in content.items():
        if isinstance(value, dict):
            yield from _counts({str(key): item for key, item in value.items()})
        elif isinstance(value, int) and not isinstance(value, bool) and not name.endswith(("_id", "_index")):
            yield name, value


class CheckpointLoader:
    """One checkpoint, to be looked at first and then loaded.

    Args:
        folder: as `find_folder` gives it.
        options: how it is to be loaded.
        headers: dtypes of the tensors by name, of a checkpoint whose weights are not here: it cannot be loaded.

    Raises:
        CheckpointError: if the checkpoint cannot be streamed. Nothing is loaded by then.
    """

    def __init__(self, folder: str, options: LoadingOptions = AS_IT_IS, headers: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._gguf = GgufFile(folder) if folder.endswith(SUFFIX) else None
        read = headers is None and self._gguf is None
        self.stored = read_checkpoint(folder, options.variant) if read else {}
        self._dtypes = [item.spec.dtype for item in self.stored.values()] if headers is None else dtypes_of(headers)
        self._options = options
        self.config = read_config(metadata_folder(folder), options)
        quantization = getattr(self.config, "quantization_config", None)
        self._method = None if quantization is None else _method_of(quantization)
        self.dtype = self._resolve_dtype(options.dtype)
        self._weights = self._small_weights() if self._method in READERS and self.stored else None
        self.encoding = options.encoding
        """What of a plain checkpoint is encoded when it is loaded; None if nothing is."""
        if self.encoding is not None and (quantization is not None or self._gguf is not None):
            raise ConfigError(
                f"{folder} is quantised already: weights={options.weights!r} encodes plain checkpoints; leave it out"
            )
        self._forms: Forms | None = None
        self._encoded_file: BlockFile | None = None

    @property
    def sources(self) -> frozenset[str]:
        """The files that the weights are in."""
        if self._gguf is not None:
            return frozenset(parts_of(self._gguf.path))
        return frozenset(item.range.path for item in self.stored.values())

    @property
    def weights(self) -> StoredWeights | None:
        """What a quantised checkpoint holds, by the model's names; None of a plain one."""
        if self._gguf is not None and self._weights is None:
            outline = self.outline()
            assert outline is not None
            self._weights = self._gguf.weights(outline, self.dtype)
        return self._weights

    def _small_weights(self) -> StoredWeights | None:
        """What the files hold, if the model has each tensor as it is; None where transformers converts them on the way."""
        if getattr(self.config, "auto_map", None) and self._options.trust_remote_code:
            # Its code is found by the folder's name, under which transformers would decode everything.
            return None
        quantised, method = self.config, self._method
        self.config, self._method = copy.deepcopy(quantised), None
        del self.config.quantization_config
        outline = self.outline()
        assert outline is not None
        shapes = {name: tuple(value.shape) for name, value in outline.state_dict().items()}
        said = quantised.quantization_config
        said = said if isinstance(said, dict) else said.to_dict()
        weights = READERS[str(method)](self.stored, said, str(self.dtype).removeprefix("torch."), shapes)
        if weights.encoded and weights.encoded.keys() <= shapes.keys():
            return weights
        self.config, self._method = quantised, method
        return None

    def outline(self) -> nn.Module | None:
        """The model without values, on torch's meta device: for planning; None for a quantised one, known late."""
        if self._method is not None:
            return None
        self._check_counts()
        with (
            torch.device("meta"),
            foreign_file(f"{self.folder}/config.json describes no model that can be made", CheckpointError),
        ):
            kind = self._class()
            options = {name: self._options.model[name] for name in _OF_THE_CONFIG if name in self._options.model}
            if kind is AutoModelForCausalLM:
                trust = self._options.trust_remote_code
                kind = partial(AutoModelForCausalLM.from_config, trust_remote_code=trust)
            else:
                kind = kind._from_config
            outline: nn.Module = kind(self.config, dtype=self.dtype, **options)
            return outline.requires_grad_(False)

    def _check_counts(self) -> None:
        """A config with counts of another world would be built for hours."""
        for name, value in _counts(self.config.to_dict()):
            most = len(self.stored) if name in _LAYER_COUNTS and self.stored else _LARGEST_COUNT
            if value > most or (value < 0 and name in _LAYER_COUNTS):
                raise CorruptCheckpoint(
                    f"{self.folder}/config.json says {name}={value}, and the checkpoint has {len(self.stored)} tensors: give "
                    "the config.json that belongs to it"
                )

    def size_of(self, unit: Unit) -> StoredSize:
        """What a block of the outline will take: exact where the files hold its tensors as they are, or encoded."""
        tensors = unit.block.tensors
        forms = self._forms_of_outline()
        if forms and any(tensor.name in forms for tensor in tensors):
            return size_of_sources([expected_source(tensor, forms) for tensor in tensors])
        if self.weights is not None:
            sources = [self.weights.source_of(tensor.name) for tensor in tensors]
        else:
            stored = [self.stored.get(tensor.name) for tensor in tensors]
            sources = [
                item.range if item is not None and (item.spec.dtype, item.spec.shape) == (tensor.dtype, tensor.shape) else None
                for item, tensor in zip(stored, tensors, strict=True)
            ]
        found = [source for source in sources if source is not None]
        return size_of_sources(found) if len(found) == len(tensors) else estimated_size(unit)

    def _forms_of_outline(self) -> "Forms":
        """How weights will be stored that are to be encoded; nothing once they are."""
        if self.encoding is None or self._weights is not None:
            return {}
        if self._forms is None:
            outline = self.outline()
            assert outline is not None
            self._forms = forms_of(outline, self.encoding)
            self.encoding = as_found(self.encoding, outline, self._forms)
            if not self._forms:
                raise ConfigError(
                    f"{self.folder} has nothing to encode: no linear layers, or only a head that is tied to the embeddings"
                )
        return self._forms

    def _encode(self, disk_dir: str | None, progress: Progress) -> list[str]:
        """Encode the weights, or find them in the disk folder; what was slower than it could be."""
        outline, forms = self.outline(), self._forms_of_outline()
        assert outline is not None
        known = outline.state_dict().keys()
        if strange := next((name for name in (*forms, *self.stored) if name not in known or name not in self.stored), None):
            raise ConfigError(
                f"weights={self._options.weights!r} encodes tensors that the model has as they are, and {strange} is converted "
                "when it is loaded; leave weights= out"
            )
        view, dtype = FileViews().of, str(self.dtype).removeprefix("torch.")
        self._weights, file = encoded_weights(
            self.stored, view, forms, dtype, disk_dir, self.key, lambda done, total: progress("encoding", done, total)
        )
        self._encoded_file = file
        if disk_dir is not None:
            return []
        return [
            f"{len(forms)} weights are encoded at each start, since no disk folder was named to keep them (--disk, disk_dir=)"
        ]

    def load(
        self, disk_dir: str | None, progress: Progress, experts: Mapping[str, tuple[int, ...]] | None = None
    ) -> LoadedModel:
        """The model with real parameters, each a view of a file.

        Args:
            disk_dir: keeps tensors that had to be converted, for the next time; None to convert every time.
            experts: shapes of the parameters whose experts will be brought one by one, by name: stand-ins will do for them.
            progress: told of the conversion, which is all that takes long here.
        """
        said = [] if self.encoding is None else self._encode(disk_dir, progress)
        if self.weights is not None:
            loaded = self._load_encoded(self.weights)
            loaded.fallbacks += said
            if self._encoded_file is not None:
                # The model's weights are read from there for as long as it lives.
                weakref.finalize(loaded.model, self._encoded_file.close)
            return loaded
        total_bytes = sum(item.spec.nbytes for item in self.stored.values())
        singles = SingleExperts(dict(experts or {}))
        conversions = Conversions(self.key, disk_dir, lambda done: progress("converting", done, total_bytes), singles)
        cache_first_pages(item.range for item in self.stored.values())
        with _loading, threads_off(), bar_off(), conversions:
            model, found = self._from_pretrained()
            self._check_whole(found)
        model.eval()
        file = conversions.finish()
        said = _said_of(found["unexpected_keys"])
        if file is None:
            return LoadedModel(model, {}, singles.pieces, fallbacks=said)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in file.tensors:
                parameter.data = file.view(name)
        places: dict[str, Source] = {name: stored.range for name, stored in file.tensors.items()}
        loaded = LoadedModel(model, places, singles.pieces, [file], said)
        if disk_dir is None:
            loaded.fallbacks.append(
                f"{len(places)} tensors are stored otherwise than the model holds them: converted at each start, since no disk "
                "folder was named to keep them (--disk, disk_dir=)"
            )
        return loaded

    def _load_encoded(self, weights: StoredWeights) -> LoadedModel:
        """The model with stand-ins for what has to be decoded, and views of files for the rest."""
        cache_first_pages(item.range for item in weights.plain.values())
        state = ModelState(weights)
        asked, kind = self._options, self._class()
        options = {"config": self.config, "dtype": self.dtype, "state_dict": state.tensors, **asked.model}
        with _loading, threads_off(), bar_off(), foreign_file(f"{self.folder} cannot be loaded", CheckpointError):
            model, found = kind.from_pretrained(None, **options, output_loading_info=True, ignore_mismatched_sizes=True)
        self._check_whole(found)
        if model.can_generate() and "generation_config" not in asked.model:
            # Without a folder's name it is left out, and a folder need not have one.
            with contextlib.suppress(OSError):
                model.generation_config = GenerationConfig.from_pretrained(metadata_folder(self.folder))
        # As from a folder: an adapter that is saved names its model by it.
        model.eval().name_or_path = model.config.name_or_path = self.folder
        said = _said_of([*weights.unused, *found["unexpected_keys"]])
        return LoadedModel(model, dict(state.found_in(model)), fallbacks=said)

    def _check_whole(self, found: dict[str, Any]) -> None:
        """transformers makes up what a checkpoint lacks, at random: no such model is run."""
        if missing := sorted(found["missing_keys"]):
            raise CheckpointError(
                f"{self.folder} lacks {len(missing)} tensors that the model has, such as {missing[0]}: they would be random. "
                "Give a checkpoint that was saved from this kind of model, with the config.json that belongs to it."
            )
        if mismatched := sorted(str(item) for item in found["mismatched_keys"]):
            raise CheckpointError(
                f"{self.folder}: {len(mismatched)} tensors have other shapes than config.json says, such as {mismatched[0]}. "
                "Give the config.json that belongs to the weights."
            )

    def _from_pretrained(self) -> tuple[Any, dict[str, Any]]:
        asked = self._options
        options = {"config": self.config, "dtype": self.dtype, "trust_remote_code": asked.trust_remote_code, **asked.model}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "variant": asked.variant}
        if asked.code_revision is not None:
            options["code_revision"] = asked.code_revision
        kind: Any = self._class()
        if self._method is None:
            with foreign_file(f"{self.folder} cannot be loaded", CheckpointError):
                plain: tuple[Any, dict[str, Any]] = kind.from_pretrained(self.folder, **options)
            return plain
        try:
            model, found = kind.from_pretrained(self.folder, **options)
            for name, parameter in model.named_parameters():
                tensor_spec(name, parameter)
        except (ImportError, RuntimeError, ValueError, NotImplementedError, UnsupportedCheckpoint) as error:
            raise UnsupportedCheckpoint(
                f"{self.folder} is quantised with {self._method}, and its weights are not plain tensors that can be streamed "
                f"here ({str(error).splitlines()[0]}). Use the unquantised checkpoint."
            ) from error
        return model, found

    def _class(self) -> Any:
        names = getattr(self.config, "architectures", None) or []
        known = getattr(transformers, names[0], None) if names else None
        remote = getattr(self.config, "auto_map", None) and self._options.trust_remote_code
        if isinstance(known, type) and issubclass(known, PreTrainedModel) and not remote:
            return known
        if not remote and type(self.config) in AutoModelForCausalLM._model_mapping:
            return AutoModelForCausalLM._model_mapping[type(self.config)]
        return AutoModelForCausalLM

    def _resolve_dtype(self, dtype: Any) -> torch.dtype:
        if isinstance(dtype, str) and dtype != "auto":
            found = getattr(torch, dtype, None)
            if not isinstance(found, torch.dtype):
                raise ConfigError(f"dtype={dtype!r} is not a dtype; give auto, bfloat16, float16 or float32")
            dtype = found
        if isinstance(dtype, torch.dtype):
            if not dtype.is_floating_point:
                raise ConfigError(f"dtype={dtype} is not a floating-point dtype; give auto, bfloat16, float16 or float32")
            return dtype
        if dtype != "auto":
            raise ConfigError(f"dtype={dtype!r} is not one dtype for all weights; give auto, bfloat16, float16 or float32")
        if isinstance(self.config.dtype, torch.dtype):
            return self.config.dtype
        if self._gguf is not None:
            return torch.bfloat16
        kinds = [getattr(torch, name) for name in self._dtypes]
        return next((kind for kind in kinds if kind.is_floating_point), torch.float32)

    @property
    def key(self) -> str:
        """Stands for the checkpoint's files, and how the model is made of them."""
        facts = {
            "files": [identity(path) for path in sorted(self.sources)],
            "key_mapping": self._options.model.get("key_mapping"),
            "class": self._class().__name__,
            "config": self.config.to_json_string(use_diff=False),
            "dtype": str(self.dtype),
            "transformers": transformers.__version__,
            "layout": _LAYOUT_VERSION,
            "encoding": str(self.encoding),
        }
        return key_of(facts)


def _said_of(unused: Iterable[str]) -> list[str]:
    """A sentence for tensors that no parameter is made of, if there are any."""
    names = sorted(unused)
    return [f"{len(names)} tensors of the checkpoint are not used by the model, such as {names[0]}"] if names else []


def _method_of(quantization: Any) -> str:
    method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", None)
    return str(getattr(method, "value", method) or "an unnamed method")
