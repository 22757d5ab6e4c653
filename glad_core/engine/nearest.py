"""A method without diffusion: PatchCore's memory of good patches (Roth et al., CVPR 2022) on the bundle's features.

The anomaly score of a patch is its distance to the nearest remembered patch of the good images. Features, map and image
score are those of GLAD's final comparison, so the two methods differ only in what an image is compared with.

Unlike in PatchCore, features are whitened by the good patches, so directions in which these differ much weigh less.
With the small model's features that added .01 to .03 to the image AUROC: of defects of printed circuit boards, and of
faint synthetic anomalies on good magnetic tiles and solar cells (29 November 2026).

Shapes: B images, N patches of an image, g patches along a side, D feature width, M patches remembered.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glad_core import scoring
from glad_core.bundle.memory import PatchMemory
from glad_core.bundle.model import Model
from glad_core.engine.base import Queue, Verdict
from glad_core.images import to_tensor
from glad_core.verdict import Detection, Request, finite

CANDIDATES = 50_000  # patches from which the memory is chosen
REMEMBERED = 5_000
PROJECTED = 64  # width of the features in which distances are taken for the choice
QUERIES = 500  # at a time, so that their distances to `CANDIDATES` take 100 MB
SHRINKAGE = 0.3  # variance added in every direction before whitening, of the mean variance


@torch.inference_mode()
def patch_features(model: Model, images_B3RR: Tensor) -> Tensor:
    """Unit-length patch features, float32 [B, N, D]: the layers compared, each averaged over 3 x 3 patches, normalised.

    Images are in [-1, 1], as large as the method sees them; they are normalised as for the final map.
    """
    prepared = model.final_features.normalize(images_B3RR.to(model.device)).to(model.dtype)
    layers = []
    for tokens in model.final_features(prepared):
        grid = round(tokens.shape[1] ** 0.5)
        square = tokens.float().transpose(1, 2).unflatten(2, (grid, grid))
        averaged = F.avg_pool2d(F.pad(square, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        layers.append(F.normalize(averaged.flatten(2).transpose(1, 2), dim=2))
    return torch.cat(layers, dim=2) / len(layers) ** 0.5


def remember(patches_PD: Tensor, seed: int = 0, moments: Moments | None = None) -> tuple[PatchMemory, Tensor]:
    """Choose the memory of good patches: a greedy k-centre coreset, so every good patch has a near one in it.

    At most `CANDIDATES` random patches are considered and `REMEMBERED` kept. Distances are taken after a random
    projection, as in PatchCore. What is kept has the precision that it is stored in.

    Args:
        moments: of the patches, if they are known.

    Returns:
        The memory, and the rows of ``patches_PD`` that it holds, int64 [M] on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(patches_PD), generator=generator)[:CANDIDATES]
    candidates = patches_PD[chosen.to(patches_PD.device)]
    whitening_D1D = whitening(moments or Moments.of(candidates)).to(candidates.device)
    candidates = whiten(candidates, whitening_D1D)
    kept = _coreset(candidates, generator)
    return PatchMemory(candidates[kept].half().float(), whitening_D1D), chosen[kept.cpu()]


def whiten(features: Tensor, whitening_D1D: Tensor) -> Tensor:
    """Features [..., D] less the mean of the good ones, with about the same variance in every direction."""
    return features @ whitening_D1D[:-1] + whitening_D1D[-1]


class Moments(NamedTuple):
    """Number of patches, the sum of them and of their products with themselves: float64 [D] and [D, D] on the CPU."""

    number: int
    total: Tensor
    products: Tensor

    @classmethod
    def of(cls, patches_PD: Tensor) -> Moments:
        patches = patches_PD.cpu().double()  # MPS has no float64
        return cls(len(patches), patches.sum(dim=0), patches.T @ patches)

    def plus(self, others: Moments) -> Moments:
        """Those of both together."""
        return Moments(self.number + others.number, self.total + others.total, self.products + others.products)


def whitening(moments: Moments) -> Tensor:
    """Matrix and, as its last row, offset, float32 [D + 1, D] on the CPU."""
    mean = moments.total / moments.number
    variances, axes = torch.linalg.eigh(moments.products / moments.number - torch.outer(mean, mean))
    variances = variances.clamp(min=0)
    # Where unit-length features do not vary but for rounding, distances are those of the features themselves.
    vary = bool(variances.mean() > 1e-10)
    matrix = axes / (variances + SHRINKAGE * variances.mean()).sqrt() if vary else axes
    return torch.cat([matrix, -mean[None] @ matrix]).float()


def _coreset(candidates: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of the candidates to keep."""
    if len(candidates) <= REMEMBERED:
        return torch.arange(len(candidates), device=candidates.device)
    projection = torch.randn(candidates.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
    flat = candidates @ projection.to(candidates.device)
    squares = flat.square().sum(dim=1)
    kept = torch.zeros(REMEMBERED, dtype=torch.long, device=flat.device)
    distance = torch.full_like(squares, torch.inf)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two are no faster in such short steps, and beside busy programs four times as slow
    try:
        for index in range(1, REMEMBERED):
            last = kept[index - 1]
            # |a - b|² by one product of matrix and vector: several times as fast as from the differences.
            distance = torch.minimum(distance, squares + squares[last] - 2 * (flat @ flat[last]))
            kept[index] = distance.argmax()
    finally:
        torch.set_num_threads(threads)
    return kept


def _distances(queries_ND: Tensor, patches_PD: Tensor) -> Tensor:
    """Distance of every query to its nearest patch, [N].

    |q - p|² / 2 less |q|² / 2 is least for the nearest patch, and is one product of matrices with an offset;
    `torch.cdist` forms all distances before the least is taken.
    """
    rest_NP = torch.addmm(patches_PD.square().sum(dim=1) / 2, queries_ND, patches_PD.T, alpha=-1)
    return (2 * rest_NP.amin(dim=1) + queries_ND.square().sum(dim=1)).clamp(min=0).sqrt()


def closest(queries_ND: Tensor, patches_PD: Tensor) -> Tensor:
    """The row of the nearest patch to every query, int64 [N]."""
    half_P = patches_PD.square().sum(dim=1) / 2
    parts = [torch.addmm(half_P, part, patches_PD.T, alpha=-1).argmin(dim=1) for part in queries_ND.split(QUERIES)]
    return torch.cat(parts)


class NearestEngine(Queue):
    """Judges images by a memory of good patches, ``slots`` at a time."""

    def __init__(self, model: Model, memory: PatchMemory, slots: int) -> None:
        super().__init__(model, slots)
        self.memory = memory

    def work(self) -> list[Verdict]:
        """Judge one batch."""
        self.admit()
        detections = detect_nearest(self.model, self.memory, self.entering)
        verdicts: list[Verdict] = list(zip(self.entering, map(finite, detections), strict=True))
        self.entering = []
        return verdicts


@torch.inference_mode()
def detect_nearest(model: Model, memory: PatchMemory, requests: Sequence[Request]) -> Iterator[Detection]:
    """Judge images by their distance to the memory. Detections have no steps, and the image as its reconstruction."""
    if not requests:
        return
    started = time.perf_counter()
    patches, whitening = (part.to(model.device) for part in memory)
    images = whiten(patch_features(model, to_tensor([request.image for request in requests])), whitening)
    # One image at a time, so that only its distances are in memory.
    nearest = torch.stack([_distances(image, patches) for image in images])
    grid = round(nearest.shape[1] ** 0.5)
    token_maps = nearest.unflatten(1, (grid, grid))
    scores = scoring.image_score(
        scoring.full_size_map(token_maps, model.settings), model.settings.image_score_top_k
    ).tolist()
    kept = token_maps.to(torch.float16).cpu().numpy()
    seconds = (time.perf_counter() - started) / len(requests)
    for row, request in enumerate(requests):
        yield Detection(
            image_id=request.image_id,
            score=scores[row],
            stop_step=None,
            stop_reason="none",
            steps=[],
            anomaly_map=kept[row],
            reconstruction=request.image,
            seconds=seconds,
        )
