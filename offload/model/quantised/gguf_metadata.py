"""What a GGUF file says beside its weights, as a folder that transformers reads: config, tokenizer, chat template.

transformers' tables make them of the file once, which takes seconds; they are kept by the file's identity.
"""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import transformers

from offload.model.quantised.gguf_files import SUFFIX, made_once, parts_of
from offload.storage.block_file import key_of
from offload.storage.cache_folder import cache_folder
from offload.storage.checkpoint import identity
from offload.storage.errors import CheckpointError, UnsupportedCheckpoint, foreign_file
from offload.storage.gguf_header import read_gguf_header

_FOLDER = "gguf"
_MOST_FOLDERS = 32


def metadata_folder(place: str) -> str:
    """The folder with a checkpoint's config and tokenizer: its own, or the one that is made of a GGUF file.

    Raises:
        UnsupportedCheckpoint: if the package `gguf` is not there, or transformers does not know the architecture.
        CheckpointError: if they cannot be made of it.
    """
    if not place.endswith(SUFFIX):
        return place
    key = key_of({"files": [identity(part) for part in parts_of(place)], "transformers": transformers.__version__})
    folder = cache_folder() / _FOLDER / key
    if not folder.is_dir():
        partial = folder.with_name(f"{key}.{secrets.token_hex(4)}")
        partial.mkdir(parents=True)
        try:
            _write(place, str(partial))
            # Another process may have been there first.
            with suppress(OSError):
                partial.rename(folder)
            for old in sorted(folder.parent.iterdir(), key=lambda item: item.stat().st_mtime)[:-_MOST_FOLDERS]:
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(folder)


def _write(place: str, folder: str) -> None:
    inside, name = os.path.dirname(place) or ".", os.path.basename(place)
    with (
        _one_reader(place),
        foreign_file(f"{place}: transformers makes no config and tokenizer of it", CheckpointError),
    ):
        config = transformers.AutoConfig.from_pretrained(inside, gguf_file=name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(inside, gguf_file=name)
        # Of a split checkpoint transformers sees the first part alone.
        tensors = {name for part in parts_of(place) for name in read_gguf_header(part).tensors}
        config.tie_word_embeddings = "output.weight" not in tensors
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _one_reader(place: str) -> Iterator[None]:
    """The file is read once, though config and tokenizer each ask for it: half of the time."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedCheckpoint(
            f'{place} is a GGUF file, whose config and tokenizer the package gguf reads: pip install "offload[gguf]"'
        ) from error
    assert gguf
    with made_once("GGUFReader"):
        yield
