"""Weights that only memory holds, written to disk so that they can be streamed from there."""

import os
from collections.abc import Sequence

import torch

from offload.config import Progress
from offload.model.homes import ParameterHome
from offload.storage.block_file import BlockFile, BlockFileWriter, check_folder
from offload.storage.errors import DiskFull, gib


def spill(homes: Sequence[ParameterHome], folder: str, progress: Progress) -> tuple[BlockFile, int]:
    """Write the parameters to a file of the folder, releasing memory tensor by tensor; the file is their home then.

    Returns:
        The file, and its bytes.

    Raises:
        DiskFull: if there is no room; whatever is raised, the parameters are as they were.
    """
    check_folder(folder)
    total = sum(home.tensor.nbytes for home in homes)
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < total:
        raise DiskFull(
            f"{gib(total)} of weights must be spilled to {folder}, which has {gib(free.f_bavail * free.f_frsize)} free; "
            "free some space, or name another folder with --disk (disk_dir=)"
        )
    writer = BlockFileWriter(folder)
    try:
        done = 0
        for home in homes:
            progress("spilling", done, total)
            writer.add(home.name, home.parameter.data)
            done += home.tensor.nbytes
            # A stand-in of the right shape that holds no memory, until the file can be mapped.
            home.tensor = torch.empty(1, dtype=home.tensor.dtype).expand(home.tensor.shape)
            home.parameter.data = home.tensor
            home.original = None
        progress("spilling", total, total)
        file = writer.finish()
    except BaseException:
        # Whatever it is: a full disk, a write error, Ctrl-C.
        _take_over(writer.so_far(), homes)
        for home in homes:
            home.restore()
        writer.abandon()
        raise
    _take_over(file, homes)
    return file, writer.nbytes


def _take_over(file: BlockFile, homes: Sequence[ParameterHome]) -> None:
    """Make the file's tensors the homes of the parameters."""
    for home in homes:
        if home.name in file.tensors:
            home.tensor = file.view(home.name)
            home.parameter.data = home.tensor
            home.modified = False
            home.version = home.parameter._version
