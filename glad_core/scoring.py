"""Anomaly maps and scores: Eq. 11-12 and Sec. 3.6 of the paper.

Shapes: B batch, N = g·g tokens, D embedding width, R side of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glad_core.bundle.settings import Settings

Match = Literal["anywhere", "window", "sum"]
LARGE = 2**24  # values of a picture's map that are held at a time: at 100 megapixels they would take gigabytes


def token_distance(
    query_BND: Tensor, reference_BND: Tensor, *, match: Match = "anywhere", radius: int = 0, rows: int = 512
) -> Tensor:
    """Eq. 11: for each query token 1 - cosine to its most similar reference token.

    ``anywhere`` is the paper's: the match may lie anywhere in the image. ``window``, not in the paper, allows tokens at
    most ``radius`` rows and columns away (0: the same position). It notices a part that is missing from an object with
    repeated parts, for which ``anywhere`` finds a twin elsewhere. ``sum`` adds the two distances.

    Computed in the tokens' dtype (the released code compares steps in float16, the final map in float32), for ``rows``
    query tokens at a time, so that 4096 x 4096 similarities are never in memory at once.

    Returns:
        [B, N] in [0, 2]; in [0, 4] for ``sum``.
    """
    query, reference = _unit(query_BND), _unit(reference_BND).transpose(1, 2)
    dtype = query.dtype
    if dtype == torch.float16 and query.device.type == "cpu":
        # The same bits, five times as fast: a CPU sums float16 products in float32 too, but one by one.
        query, reference = query.float(), reference.float()
    far = None if match == "anywhere" else _far(query.shape[1], radius, query.device)
    distances = []
    for start in range(0, query.shape[1], rows):
        similarity = query[:, start : start + rows] @ reference
        # Rounding keeps the order, so only the largest similarity is rounded and subtracted, not all N.
        candidates = [] if match == "window" else [similarity]
        if far is not None:
            candidates.append(similarity.masked_fill(far[start : start + rows], -1.0))
        distances.append(torch.stack([1 - each.amax(dim=2).to(dtype) for each in candidates]).sum(dim=0))
    return torch.cat(distances, dim=1)


@cache
def _far(count: int, radius: int, device: torch.device) -> Tensor:
    """Which pairs of N tokens on a square grid are more than ``radius`` rows or columns apart, bool [N, N]."""
    side = round(count**0.5)
    index = torch.arange(count, device=device)
    apart = [(axis[:, None] - axis[None]).abs() > radius for axis in (index // side, index % side)]
    return apart[0] | apart[1]


def token_map(
    tests_BND: Sequence[Tensor], references_BND: Sequence[Tensor], *, match: Match, radius: int, bidirectional: bool
) -> Tensor:
    """Eq. 12: the sum over layers of Eq. 11, at token resolution.

    ``bidirectional`` adds the map of the reconstruction's tokens matched to the test image's (published for transistor,
    pcb1 and pcb4). Returns [B, g, g].
    """
    total = torch.zeros(())
    for test, reference in zip(tests_BND, references_BND, strict=True):
        pairs = [(test, reference), (reference, test)] if bidirectional else [(test, reference)]
        for query, other in pairs:
            total = total + token_distance(query, other, match=match, radius=radius)
    side = round(total.shape[1] ** 0.5)
    return total.view(total.shape[0], side, side)


def resize_map(maps_BHW: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize to ``size`` (of a square: its side), bilinear with aligned corners, as everywhere in the released code."""
    size = (size, size) if isinstance(size, int) else size
    return F.interpolate(maps_BHW[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]


def pixel_distance(test_BCHW: Tensor, reconstruction_BCHW: Tensor) -> Tensor:
    """Mean over channels of the absolute difference, [B, R, R]."""
    return (test_BCHW - reconstruction_BCHW).abs().mean(dim=1)


def add_pixel_distance(maps_BHW: Tensor, distance_BHW: Tensor, v: float, *, scope: Literal["image", "batch"]) -> Tensor:
    """M + v · max(M) / max(dist) · dist.

    With scope ``image`` the maxima are per image. The released code takes them over the batch, so that a score
    depends on the other images; scope ``batch`` is for comparison with its numbers.
    """
    if v == 0:
        return maps_BHW
    if scope == "batch":
        ratio = maps_BHW.max() / distance_BHW.max().clamp(min=1e-12)
    else:
        ratio = (maps_BHW.amax((1, 2)) / distance_BHW.amax((1, 2)).clamp(min=1e-12)).view(-1, 1, 1)
    return maps_BHW + v * ratio * distance_BHW


def smooth(maps_BHW: Tensor, sigma: float) -> Tensor:
    """Gaussian blur cut at 4σ (49 taps at the published σ = 6), reflected border; σ = 0 does not blur."""
    return maps_BHW if sigma == 0 else _enlarged(maps_BHW, maps_BHW.shape[-2:], sigma)


def full_size_map(maps_Bgg: Tensor, settings: Settings, size: tuple[int, int] | None = None) -> Tensor:
    """The map that the image score is taken from: a token map resized to ``size`` (None: D x D) and smoothed."""
    return _enlarged(maps_Bgg, size or (settings.feature_resolution,) * 2, settings.blur_sigma)


def _enlarged(maps_Bgg: Tensor, size: tuple[int, ...], sigma: float) -> Tensor:
    """Maps resized as by `resize_map` and blurred.

    Both are linear along either axis, so this is a product of three matrices: the blur of a map at full size by
    torchvision, whose kernel is a square, takes almost as long as a small model's features.
    """
    down, across = (_axis_matrix(*sides, sigma).to(maps_Bgg) for sides in zip(maps_Bgg.shape[-2:], size, strict=True))
    return down @ (maps_Bgg @ across.T)


@lru_cache(maxsize=8)
def _axis_matrix(tokens: int, length: int, sigma: float) -> Tensor:
    """The matrix [length, tokens] that resizes one axis with aligned corners and smooths it."""
    resized = F.interpolate(torch.eye(tokens)[None], size=length, mode="linear", align_corners=True)[0]
    if sigma == 0:
        return resized.T
    reach = int(4 * sigma + 0.5)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    padded = resized[:, _reflected(length, reach)]
    return F.conv1d(padded[:, None], (taps / taps.sum())[None, None])[:, 0].T


def _reflected(length: int, reach: int) -> Tensor:
    """Indices of an axis and of ``reach`` places beyond either end, reflected as often as it takes."""
    period = max(1, 2 * (length - 1))
    index = torch.arange(-reach, length + reach) % period
    return torch.minimum(index, period - index)


def full_size_only(settings: Settings) -> bool:
    """Whether the map has terms of pixel resolution (v, foreground) and cannot be stored at token resolution."""
    return settings.pixel_weight_v > 0 or settings.foreground_mode != 3


def score_of_map(map_hw: np.ndarray, settings: Settings, size: tuple[int, int]) -> float:
    """The image score of a picture's map, float32 [h, w], that is ``size`` at full size."""
    whole = torch.from_numpy(map_hw)
    if full_size_only(settings):
        return float(image_score(whole[None], settings.image_score_top_k))
    down, across = (_axis_matrix(*sides, settings.blur_sigma) for sides in zip(whole.shape, size, strict=True))
    half, largest = whole @ across.T, torch.empty(0)
    for rows in down.split(max(1, LARGE // size[1])):
        values = torch.cat([largest, (rows @ half).flatten()])
        largest = values.topk(min(settings.image_score_top_k, len(values))).values
    return float(largest.mean())


def image_score(maps_BHW: Tensor, top_k: int) -> Tensor:
    """Mean of the ``top_k`` largest pixels (Sec. 3.6), [B]."""
    flat = maps_BHW.flatten(1)
    return flat.topk(min(top_k, flat.shape[1]), dim=1).values.mean(dim=1)


def _unit(tokens_BND: Tensor) -> Tensor:
    return tokens_BND / tokens_BND.norm(dim=-1, keepdim=True)
