"""Good pictures whose twin is in another block: what hides behind names in random order.

Scores of good pictures are taken without the block of their neighbours, by name (`glad_core.good_patches`). If a copy,
or a photo of the same piece, has a name far away, it stays, and the scores say too little of new pieces. Then leaving
out the one picture that most patches are nearest to makes the others clearly farther.

Share of the pictures of which that is so, small bundle, names as they are and in two random orders (30 November
2026): 400 magnetic tiles, photographed in series, .16 and .57; 376 templates of circuit boards (DeepPCB, crops of a few
boards) .12 and .52 to .55; 400 solar cells 0 and .04; 320 screws, which have no series, .01 and .04. Of 40 screws it is
up to .35 by chance, of 20 up to .45.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glad_core.calibrated_steps import evenly

LEAST = 40  # pictures; of fewer every patch has few to be near to, and chance decides
LOOKED_AT = 80
PATCHES = 64  # of each
FARTHER = 1.05  # times the mean distance, without a twin
SHARE = 0.4  # of the pictures looked at
EQUAL = 0.05  # below it distances are rounding; whitened features are about √D long


class Twins(NamedTuple):
    """Number of pictures looked at, and pairs of a picture and its twin in another block, the nearest first."""

    looked_at: int
    pairs: list[tuple[int, int]]

    def doubt(self, names: Sequence[str]) -> str | None:
        """A line if there are so many that a threshold from these pictures is too low; None if not."""
        if self.looked_at < LEAST or len(self.pairs) <= SHARE * self.looked_at:
            return None
        pair = [names[index] for index in self.pairs[0]]
        short = [name.rpartition("/")[2] for name in pair]
        one, other = short if short[0] != short[1] else pair
        return (
            f"{len(self.pairs)} of {self.looked_at} good pictures looked at have a twin far from them in the order of "
            f"names, such as {one} and {other}: copies, or photos of one piece? The threshold is then too low. Photos "
            "of one piece should follow each other by name, and be fewer than one in ten; or let `glad calibrate --run`"
            " set the threshold from other pictures"
        )


def find_twins(patches_PD: Tensor, owners_P: Tensor, blocks: Sequence[int]) -> Twins:
    """Look for twins among pictures.

    Args:
        patches_PD: whitened features, in random order within a picture.
        owners_P: the picture of each patch, int64 [P] on the CPU.
        blocks: of all pictures.
    """
    owners_P = owners_P.to(patches_PD.device)
    blocks_P = torch.tensor(blocks, device=owners_P.device)[owners_P]
    pictures = owners_P.unique().tolist()
    looked_at = [pictures[place] for place in evenly(len(pictures), LOOKED_AT)]
    farther: list[tuple[float, int, int]] = []
    for picture in looked_at:
        others_P = blocks_P != blocks[picture]
        if not others_P.any():
            continue
        distances_QP = torch.cdist(patches_PD[owners_P == picture][:PATCHES], patches_PD[others_P])
        owners = owners_P[others_P]
        before, nearest_Q = distances_QP.min(dim=1)
        twin = int(owners[nearest_Q].bincount().argmax())
        if not (rest_P := owners != twin).any():
            continue
        ratio = float(distances_QP[:, rest_P].amin(dim=1).mean() / before.mean().clamp(min=EQUAL))
        if ratio > FARTHER:
            farther.append((-ratio, picture, twin))
    return Twins(len(looked_at), [(picture, twin) for _, picture, twin in sorted(farther)])
