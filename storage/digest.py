"""A hash of a tensor's bytes that is about as fast as memory is read."""

import hashlib

import numpy
import torch

_ROW_WORDS = 1024


def digest(values: torch.Tensor) -> bytes:
    """A hash of the sums of an array's words, along its rows and along its columns: as fast as memory is read, nearly.

    An edit changes a sum, and one that only moves numbers changes their order.
    """
    content = values.detach().contiguous().view(-1).view(torch.uint8)
    whole = 0 if content.data_ptr() % 8 else len(content) // (8 * _ROW_WORDS) * 8 * _ROW_WORDS
    rows = content[:whole].view(torch.int64).view(-1, _ROW_WORDS)
    found = hashlib.blake2b(digest_size=16)
    for part in (_sum(rows, 1), _sum(rows, 0), content[whole:].cpu().numpy()):
        found.update(part.tobytes())
    return found.digest()


def _sum(rows: torch.Tensor, axis: int) -> numpy.ndarray:
    """On the device that has them; on the CPU in the calling thread alone, for which torch would start further ones."""
    sums: numpy.ndarray = numpy.add.reduce(rows.numpy(), axis) if rows.device.type == "cpu" else rows.sum(axis).cpu().numpy()
    return sums
