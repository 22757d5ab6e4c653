"""How many good images are kept out of training or memory, to set the threshold by."""

from __future__ import annotations

NEEDED = 19  # for a false-positive rate of 5 % (`threshold.images_needed`)


def held_out_count(images: int, share: float) -> int:
    """How many of so many good images are held out: a ``share`` of them, or as many as a threshold of 5 % needs.

    A new good image exceeds the largest of n scores with probability 1 / (n + 1), so a share of few images would make a
    threshold that many good ones exceed. To leave most for the model, no more than a third is held out for that reason;
    one at least.
    """
    return max(1, round(images * share), min(NEEDED, images // 3))
