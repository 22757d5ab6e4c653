"""Where the object is: synthetic anomalies stay on it, and the final map can be limited to it.

Shapes: B batch, H W image.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

ForegroundMode = Literal[1, 2, 3]


def foreground(images_B3HW: Tensor, mode: ForegroundMode) -> Tensor:
    """Where the object is, bool [B, H, W]: by Otsu on grey 1 darker, 2 brighter than the background; 3 everywhere."""
    if mode == 3:
        return torch.ones(images_B3HW.shape[0], *images_B3HW.shape[-2:], dtype=torch.bool)
    grey = ((TF.rgb_to_grayscale(images_B3HW)[:, 0] + 1) * 127.5).round().clamp(0, 255)
    threshold = torch.stack([otsu(image) for image in grey]).view(-1, 1, 1)
    return grey <= threshold if mode == 1 else grey > threshold


def otsu(grey_HW: Tensor) -> Tensor:
    """Otsu's threshold of one grey image with values 0..255: the level (scalar) that splits it best into <= and >."""
    counts = torch.bincount(grey_HW.flatten().long(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64, device=counts.device)
    below, total = counts.cumsum(0), counts.sum()
    mean_below = (counts * levels).cumsum(0)
    mean_all = mean_below[-1]
    # Between-class variance times total²; NaN where a class is empty.
    between = (mean_all * below - mean_below * total) ** 2 / (below * (total - below))
    return between.nan_to_num(nan=-1.0, posinf=-1.0).argmax().to(grey_HW.dtype)


def object_mask(images_B3HW: Tensor, mode: ForegroundMode, sigma: float = 6.0) -> Tensor:
    """The softened foreground that multiplies the final map, float [B, H, W] in [0, 1].

    Gaussian (σ, cut at 4σ), everything above 0 set to 1, Gaussian again: wider than the object, with soft edges.
    """
    taps = 2 * int(4 * sigma + 0.5) + 1
    mask = foreground(images_B3HW, mode).to(images_B3HW.dtype)[:, None]
    wide = (TF.gaussian_blur(mask, [taps, taps], [sigma, sigma]) > 0).to(mask.dtype)
    return TF.gaussian_blur(wide, [taps, taps], [sigma, sigma])[:, 0].to(images_B3HW.device)
