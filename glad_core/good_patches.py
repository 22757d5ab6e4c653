"""The good patches that method ``nearest`` compares with, and the scores of good pictures that its threshold rests on.

A picture is at no distance from its own patches, and a photo of the same piece taken next is near them too: such scores
say little of new pictures. So good pictures are put into blocks of neighbours, and each is judged by the patches of the
other blocks (cross-conformal prediction, Vovk 2015).

Of 400 good magnetic tiles, each hundred consecutive ones taken as new: 6, 6, 2 and 13 % exceed a threshold for 5 %.
Where only a picture's own patches are left out it is 28, 39, 26 and 38 %; where the threshold is from a tenth held out,
in four runs of neighbours, 20, 19, 1 and 10 % (30 November 2026).

Shapes: N pictures that are judged, V views, P patches of good pictures, M of them remembered, D feature width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glad_core.bundle.memory import PatchMemory
from glad_core.bundle.model import Model
from glad_core.bundle.settings import Settings
from glad_core.calibrated_steps import evenly
from glad_core.engine import nearest
from glad_core.errors import GladError
from glad_core.images import to_tensor
from glad_core.name_order import name_order
from glad_core.pictures import score_pictures
from glad_core.twins import find_twins
from glad_core.views import Frames, cut

BLOCKS = 10  # of neighbours in a group
MAX_TILES = 2000  # of a view, from which the memory is chosen
BATCH = 8  # tiles per call of the networks
SCORED, SCORED_TILES = 200, 2000  # pictures that are judged, and about how many tiles at most
SCORED_OF_EACH = 40  # but at least so many of each category, as are held out in training


class GoodPicture(NamedTuple):
    """A good picture: its name, its category or its folder, its frames in every view, whether it may be remembered."""

    name: str
    group: str
    frames: Frames
    remembered: bool = True


class _Remembered(NamedTuple):
    """What is remembered of a view: the memory, its patches before they were whitened [M, D], and their blocks [M].

    ``others_MD`` are the nearest patches of other blocks to those remembered: a patch that is like many was remembered
    instead of these. ``moments`` are those of all patches of every block.
    """

    memory: PatchMemory
    features_MD: Tensor
    others_MD: Tensor
    blocks_M: Tensor
    moments: dict[int, nearest.Moments]

    def without(self, block: int) -> PatchMemory:
        """About the memory that there would be without the block's pictures."""
        rest = reduce(nearest.Moments.plus, (part for own, part in self.moments.items() if own != block))
        whitening_D1D = nearest.whitening(rest).to(self.features_MD.device)
        features_MD = torch.where((self.blocks_M == block)[:, None], self.others_MD, self.features_MD)
        return PatchMemory(nearest.whiten(features_MD, whitening_D1D).half().float(), whitening_D1D)


@dataclass(frozen=True)
class GoodPatches:
    """Remembered patches of every view, and the good pictures that are judged by them.

    Attributes:
        model: that judges, whose method is ``nearest``; its own memory is not used.
        views: what is remembered of each.
        pictures: N of them.
        blocks: of these pictures.
        doubt: a line if twins in different blocks make their scores too low (`glad_core.twins`).
    """

    model: Model
    views: list[_Remembered]
    pictures: list[GoodPicture]
    blocks: list[int]
    doubt: str | None

    @property
    def memory(self) -> list[PatchMemory]:
        """Of every view."""
        return [view.memory for view in self.views]

    def tiles(self) -> int:
        """How many tiles `scores` judges."""
        return sum(_tiles(self.model.settings, picture) for picture in self.pictures)

    def scores(self, seed: int, on_tile: Callable[[int], None] = lambda count: None) -> np.ndarray:
        """Scores of the pictures, float64 [N, V], by the patches of other blocks than their own.

        Raises:
            NotFinite: a picture has no finite score.
        """
        scores = np.empty((len(self.pictures), len(self.views)))
        for block in sorted(set(self.blocks)):
            rows = [row for row, own in enumerate(self.blocks) if own == block]
            names, groups, frames, _ = zip(*(self.pictures[row] for row in rows), strict=True)
            model = replace(self.model, memory=[view.without(block) for view in self.views])
            scores[rows] = score_pictures(model, frames, groups, names, BATCH, seed, on_tile)
        return scores


def remember(model: Model, pictures: Iterable[GoodPicture], seed: int) -> GoodPatches:
    """Choose the good patches of every view, and the pictures to judge by them: evenly spread, of each group.

    Args:
        model: whose method is ``nearest``.
        pictures: in any order; at least one may be remembered.

    Raises:
        GladError: a picture has no finite features.
    """
    pictures = sorted(pictures, key=lambda picture: (picture.group, name_order(picture.name)))
    blocks = torch.tensor(blocks_of([picture.group for picture in pictures]))
    views: list[_Remembered] = []
    for view in range(len(model.settings.views)):
        features_PD, owners_P = _features(model, pictures, view, seed)
        views.append(_remember(features_PD, blocks[owners_P].to(features_PD.device), seed))
        if view == 0:
            whitened_PD = nearest.whiten(features_PD, views[0].memory.whitening)
            doubt = find_twins(whitened_PD, owners_P, blocks.tolist()).doubt([picture.name for picture in pictures])
    # A picture whose block has all patches of a view cannot be judged.
    judged = [
        index for index in _judged(model, pictures) if all(view.moments.keys() - {int(blocks[index])} for view in views)
    ]
    return GoodPatches(model, views, [pictures[index] for index in judged], blocks[judged].tolist(), doubt)


def _remember(features_PD: Tensor, blocks_P: Tensor, seed: int) -> _Remembered:
    moments = {block: nearest.Moments.of(features_PD[blocks_P == block]) for block in blocks_P.unique().tolist()}
    memory, rows_M = nearest.remember(features_PD, seed, reduce(nearest.Moments.plus, moments.values()))
    rows_M = rows_M.to(features_PD.device)
    kept_MD, kept_blocks_M = features_PD[rows_M], blocks_P[rows_M]
    others_MD = kept_MD.clone()
    whitened_PD = nearest.whiten(features_PD, memory.whitening)
    for block in moments:
        own_M, rest_P = kept_blocks_M == block, blocks_P != block
        if own_M.any() and rest_P.any():
            closest = nearest.closest(whitened_PD[rows_M[own_M]], whitened_PD[rest_P])
            others_MD[own_M] = features_PD[rest_P][closest]
    return _Remembered(memory, kept_MD, others_MD, kept_blocks_M, moments)


def blocks_of(groups: Sequence[str]) -> list[int]:
    """The block of every picture, 0 to `BLOCKS` - 1, from their groups: consecutive ones of each, equally many."""
    counts, seen = Counter(groups), Counter[str]()
    blocks = []
    for group in groups:
        blocks.append(seen[group] * BLOCKS // counts[group])
        seen[group] += 1
    return blocks


def _judged(model: Model, pictures: Sequence[GoodPicture]) -> list[int]:
    """Indices of the pictures to judge."""
    groups: dict[str, list[int]] = {}
    for index, picture in enumerate(pictures):
        # Each category of a bundle for several has a threshold of its own.
        groups.setdefault(picture.group if model.prompts else "", []).append(index)
    affordable = SCORED_TILES * len(pictures) // sum(_tiles(model.settings, picture) for picture in pictures)
    each = max(SCORED_OF_EACH, min(SCORED, affordable) // len(groups))
    return [indices[place] for indices in groups.values() for place in evenly(len(indices), each)]


def _tiles(settings: Settings, picture: GoodPicture) -> int:
    return sum(len(framing.places(*picture.frames.size)) for framing in settings.framings())


def _features(model: Model, pictures: Sequence[GoodPicture], view: int, seed: int) -> tuple[Tensor, Tensor]:
    """Patch features [P, D] of pictures in one view, and the index of each one's picture, [P].

    As many random ones as `nearest.remember` considers.

    Raises:
        GladError: a picture has none that are finite.
    """
    generator = torch.Generator().manual_seed(seed)
    framing = model.settings.framings()[view]
    tiles = [
        (index, tile)
        for index, picture in enumerate(pictures)
        if picture.remembered
        for tile in cut(picture.frames.frames[view], framing.places(*picture.frames.size), framing.side)
    ]
    some = [tiles[number] for number in torch.randperm(len(tiles), generator=generator)[:MAX_TILES].tolist()]
    share = -(-nearest.CANDIDATES // len(some))  # patches of each tile: all of them together may be gigabytes
    parts, owners = [], []
    for start in range(0, len(some), BATCH):
        indices, pixels = zip(*some[start : start + BATCH], strict=True)
        features_BND = nearest.patch_features(model, to_tensor(pixels))
        _refuse(
            model.model_id, [pictures[indices[row]].name for row in (~features_BND.isfinite().all((1, 2))).nonzero()]
        )
        for index, features_ND in zip(indices, features_BND, strict=True):
            kept = torch.randperm(len(features_ND), generator=generator)[:share]
            parts.append(features_ND[kept.to(features_ND.device)])
            owners += [index] * len(kept)
    return torch.cat(parts), torch.tensor(owners)


def _refuse(model_id: str, names: list[str]) -> None:
    if names:
        raise GladError(
            f"the features of model {model_id} are not finite for {len(names)} good images, such as {names[0]}: "
            "leave them out, or take another bundle"
        )
