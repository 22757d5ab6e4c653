"""The good patches that method ``nearest`` compares with, as a bundle or a run stores them.

Shapes: M patches remembered, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from glad_core.bundle.weights import read_shapes, read_tensors
from glad_core.errors import GladError

# The patches were called otherwise while pictures were compared at other scales: such memories are refused.
PATCHES, WHITENING = "good_patches", "whitening"


class PatchMemory(NamedTuple):
    """Whitened good patches [M, D] of a view, and what whitens others: a matrix and an offset, [D + 1, D]."""

    patches: Tensor
    whitening: Tensor


def memory_tensors(memory: Sequence[PatchMemory]) -> dict[str, Tensor]:
    """The memory of every view as it is stored; the patches in float16."""
    stored = {f"{PATCHES}.{view}": kept.patches.half().cpu() for view, kept in enumerate(memory)}
    return stored | {f"{WHITENING}.{view}": kept.whitening.cpu() for view, kept in enumerate(memory)}


def memory_of(tensors: Mapping[str, Tensor], views: int) -> list[PatchMemory]:
    """What `memory_tensors` stored for as many views.

    Raises:
        GladError: these tensors are something else.
    """
    _check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, views)
    named = [(tensors[f"{PATCHES}.{view}"], tensors[f"{WHITENING}.{view}"]) for view in range(views)]
    return [PatchMemory(patches.float(), whitening.float()) for patches, whitening in named]


def read_memory(file: Path, views: int, device: str | torch.device) -> list[PatchMemory]:
    """The memory in a bundle's file. The shapes are checked before anything is read.

    Raises:
        GladError: it holds something else.
    """
    shapes = read_shapes(file)
    try:
        _check(shapes, views)
    except GladError as error:
        raise GladError(f"{file}: {error}; train the bundle again") from error
    return memory_of(read_tensors(file, shapes, device), views)


def _check(shapes: Mapping[str, tuple[int, ...]], views: int) -> None:
    names = {f"{part}.{view}" for part in (PATCHES, WHITENING) for view in range(views)}
    pairs = [(shapes.get(f"{PATCHES}.{view}", ()), shapes.get(f"{WHITENING}.{view}")) for view in range(views)]
    if shapes.keys() != names or any(len(a) != 2 or 0 in a or b != (a[1] + 1, a[1]) for a, b in pairs):
        raise GladError(f"not the good patches of {views} views")
