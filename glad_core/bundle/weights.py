"""Weights from safetensors into a network, strictly: exactly its tensors, in its shapes, all finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from glad_core.errors import GladError, one_line

COUNTS = ".num_batches_tracked"
LARGEST_BUFFERS = 2**24  # values in a layer that its configuration alone determines
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
Shapes = Mapping[str, tuple[int, ...]]
N = TypeVar("N", bound=nn.Module)


def load_network(
    make: Callable[[], N],
    config: Path,
    weights: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> N:
    """A frozen network in evaluation mode from a file of weights.

    It is built without memory first, so sizes that do not fit the file cost nothing.

    Args:
        make: builds the network.
        config: the file that ``make`` has its sizes from, for the message.

    Raises:
        GladError: no such network can be built, or as `read_tensors`.
    """
    try:
        with torch.device("meta"):
            network = make()
    except GladError as error:
        raise GladError(f"{config}: {error}") from error
    except Exception as error:  # diffusers and timm raise whatever the sizes provoke
        raise GladError(
            f"{config}: no network can be built from it ({one_line(error)}); copy the bundle again"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in storable(network.state_dict()).items()}
    network.load_state_dict(read_tensors(weights, expected, device, dtype), assign=True)
    _compute_buffers(network, device)
    if any(tensor.is_meta for tensor in chain(network.parameters(), network.buffers())):
        raise GladError(f"{config}: a {type(network).__name__} of this kind cannot be stored in a bundle")
    return network.eval().requires_grad_(False)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's tensors without the step counts of its batch norms, which only training with other norms reads."""
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTS)}


def _compute_buffers(network: nn.Module, device: str | torch.device) -> None:
    """Fill the buffers that no file holds because their layer computes them, such as the angles of rotary positions."""
    for layer in network.modules():
        compute: Any = getattr(layer, "init_non_persistent_buffers", None)
        empty = {name: buffer for name, buffer in layer.named_buffers(recurse=False) if buffer.is_meta}
        if compute is None or not empty or sum(buffer.numel() for buffer in empty.values()) > LARGEST_BUFFERS:
            continue
        for name, buffer in empty.items():
            setattr(layer, name, torch.empty_like(buffer, device=device))
        compute()


def read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, by name.

    Raises:
        GladError: not a safetensors file, or one with tensors of whole numbers.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 (no mapping)
            kinds = {name: tensor.get_dtype() for name, tensor in slices.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    for name, kind in kinds.items():
        if kind not in FLOATS:
            raise GladError(f"{file}: tensor {name!r} is of type {kind}, not of {', '.join(FLOATS)}; make it again")
    return shapes


def read_tensors(
    file: Path, expected: Shapes, device: str | torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """The tensors of a file by name, copied into memory.

    Raises:
        GladError: not a safetensors file, tensors or shapes other than ``expected``, or values that are not finite.
    """
    shapes = read_shapes(file)
    for name in sorted(expected.keys() ^ shapes.keys()):
        wrong = "is missing" if name in expected else "is not one of this network"
        raise GladError(f"{file}: tensor {name!r} {wrong}; copy the bundle again or make it again")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise GladError(
                f"{file}: tensor {name!r} is {list(shapes[name])}, its configuration says {list(shape)}; "
                "copy the bundle again or make it again"
            )
    try:
        with safe_open(file, framework="pt") as weights:
            # A copy: the file's own pages would change, or crash the process, if somebody wrote into it.
            tensors = {name: weights.get_tensor(name).to(device, dtype, copy=True) for name in expected}
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error
    if bad := not_finite(tensors.items()):
        raise GladError(
            f"{file}: tensor {bad!r} holds values that are not finite; copy the bundle again or train again"
        )
    return tensors


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or an infinite value; None if there is none."""
    return next((name for name, tensor in tensors if not bool(tensor.isfinite().all())), None)


def _damaged(file: Path, error: Exception) -> GladError:
    return GladError(f"{file}: not a readable safetensors file ({one_line(error)}); copy the bundle again")
