"""Embeddings that are looked up in rows: the table itself is never loaded."""

import time
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from offload.model.homes import ParameterHome
from offload.runtime.row_upload import RowUpload
from offload.storage.blocks import BlockKey
from offload.storage.codecs.weights import EncodedTensor, Source, parts_of
from offload.storage.errors import StaleSlot, UnsupportedCheckpoint
from offload.storage.reader import DiskReader


class EmbeddingTable:
    """An embedding whose rows are fetched as they are looked up; the table itself is never loaded.

    Args:
        home: its weight, [rows, width].
        source: where the rows lie on disk; None to take them from the home in CPU memory.
    """

    def __init__(
        self, key: BlockKey, home: ParameterHome, reader: DiskReader, source: Source | None, upload: RowUpload
    ) -> None:
        if source is not None and len(parts_of(source)) > 1:
            raise UnsupportedCheckpoint(
                f"{home.name} is a table in {len(parts_of(source))} parts, of which no rows can be read"
            )
        self.key = key
        self.homes = [home]
        self.was_read_whole = False
        self.waited_seconds = 0.0
        """Seconds spent waiting for rows from disk, since this was last set to 0."""
        self._reader, self._source, self._upload = reader, source, upload

    @property
    def on_disk(self) -> bool:
        """Its rows come from a file, but for those that somebody wrote."""
        return self._source is not None

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """The looked-up rows, [*indices.shape, width], on the device of `indices`."""
        home = self.homes[0]
        home.notice_changes()
        # The one wait: which rows they are is on the device.
        wanted = indices.to("cpu", torch.int64).reshape(-1)
        if len(wanted) and not 0 <= (least := int(wanted.min())) <= (most := int(wanted.max())) < len(home.tensor):
            raise IndexError(f"{home.name} has {len(home.tensor)} rows, and row {most} or {least} was looked up")
        table, fetched = home.tensor, wanted
        if self._source is not None and not home.modified:
            unique, fetched = torch.unique(wanted, return_inverse=True)
            begun = time.perf_counter()
            table = self._read(self._source, unique.tolist(), home.tensor.shape[1:])
            self.waited_seconds += time.perf_counter() - begun

        def fill(rows: torch.Tensor) -> None:
            with torch.no_grad():
                torch.index_select(table, 0, fetched, out=rows)

        rows = self._upload.run((len(wanted), table.shape[1]), table.dtype, fill)
        return rows.view(*indices.shape, table.shape[1])

    def whole(self, device: torch.device) -> torch.Tensor:
        """The whole table, for a forward that does otherwise than look rows up."""
        home = self.homes[0]
        home.notice_changes()
        self.was_read_whole = True
        if self._source is None or home.modified:
            return home.tensor.to(device)
        return self._read(self._source, [0], home.tensor.shape).to(device)

    def _read(self, source: Source, pieces: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Pieces of the table, each of the given shape, one after another.

        Args:
            pieces: the number of each.
        """
        (stored,), numbers = parts_of(source), prod(shape)
        width = stored.nbytes // (self.homes[0].tensor.numel() // numbers)
        dtype = self.homes[0].tensor.dtype
        read = torch.empty((len(pieces), width), dtype=torch.uint8)
        self._reader.read_rows(stored, pieces, width, read, self.key)
        if not isinstance(source, EncodedTensor):
            return read.view(dtype).view(-1, shape[-1])
        values = torch.empty((len(pieces) * numbers // shape[-1], shape[-1]), dtype=dtype)
        source.codec.decode([read.view(-1)], values)
        return values


class RowwiseEmbedding(TorchFunctionMode):
    """While an embedding's forward runs, its look-ups are answered by the rows themselves.

    A forward that computes with the weight in another way (slices it, say) gets the whole table.
    """

    def __init__(self, table: EmbeddingTable, device: torch.device, trains: bool) -> None:
        super().__init__()
        self._table = table
        self._device = device
        self._trains = trains
        self._whole: torch.Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.embedding:
            indices, weight = args[0], args[1]
            if weight is self._table.homes[0].parameter:
                if self._trains and torch.is_grad_enabled() and weight.requires_grad:
                    padding = args[2] if len(args) > 2 else (kwargs or {}).get("padding_idx")
                    row = -1 if padding is None else padding
                    looked_up: torch.Tensor = _LookedUp.apply(weight, indices, self._table, row)  # type: ignore[no-untyped-call]
                    return looked_up
                return self._guarded(weight, lambda: self._table.rows(indices))
        if getattr(function, "__name__", "") == "__get__":
            return function(*args, **(kwargs or {}))
        return function(*self._filled(args), **self._filled(kwargs or {}))

    def _guarded(self, weight: torch.Tensor, fetch: Callable[[], torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled() and weight.requires_grad:
            fetched: torch.Tensor = _NoBackward.apply(weight, self._table.key, fetch)  # type: ignore[no-untyped-call]
            return fetched
        return fetch()

    def _read_whole(self, weight: torch.Tensor) -> torch.Tensor:
        if self._trains and torch.is_grad_enabled() and weight.requires_grad:
            whole: torch.Tensor = _ReadWhole.apply(weight, self._table, self._device)  # type: ignore[no-untyped-call]
            return whole
        return self._guarded(weight, lambda: self._table.whole(self._device))

    def _filled(self, value: Any) -> Any:
        """The arguments, with the table itself in place of its parameter."""
        if value is self._table.homes[0].parameter:
            if self._whole is None:
                self._whole = self._read_whole(value)
            return self._whole
        if type(value) in (tuple, list):
            return type(value)(self._filled(item) for item in value)
        if type(value) is dict:
            return {name: self._filled(item) for name, item in value.items()}
        return value


class _LookedUp(torch.autograd.Function):
    """Rows of a table, and the gradient that looking them up in the whole table would give it."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, indices: torch.Tensor, table: EmbeddingTable, padding: int) -> torch.Tensor:
        ctx.save_for_backward(indices)
        ctx.home, ctx.rows, ctx.padding = table.homes[0], len(table.homes[0].tensor), padding
        ctx.table_device = weight.device
        return table.rows(indices)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (indices,) = ctx.saved_tensors
        _is_written_to_next(ctx.home)
        dense = torch.ops.aten.embedding_dense_backward(gradients[0], indices, ctx.rows, ctx.padding, False)
        # The table was never on the device, so its gradient belongs where the parameter is.
        return dense.to(ctx.table_device), None, None, None


class _ReadWhole(torch.autograd.Function):
    """A whole table, which gets the gradient of its copy."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, table: EmbeddingTable, device: torch.device) -> torch.Tensor:
        ctx.home, ctx.table_device = table.homes[0], weight.device
        return table.whole(device)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        _is_written_to_next(ctx.home)
        return gradients[0].to(ctx.table_device), None, None


def _is_written_to_next(home: ParameterHome) -> None:
    """What follows backward may write to it without a trace: its home has the values from now on, not the file."""
    if not home.trained:
        home.modified = True


class _NoBackward(torch.autograd.Function):
    """Values of a table that a backward pass stops at, instead of silently giving the table no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, key: BlockKey, fetch: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.key = key
        return fetch()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise StaleSlot(
            f"backward reaches {ctx.key}, of which only single rows were read: this session streams weights for the "
            "forward pass only. Run the model under torch.no_grad(), or train it outside of the context."
        )
