"""Where on an image the object is: synthetic anomalies can be confined to it, and the final map limited to it.

Shapes: B batch, H W image.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

ForegroundMode = Literal[1, 2, 3]


def foreground(images_B3HW: Tensor, mode: ForegroundMode) -> Tensor:
    """Where the object is, bool [B, H, W], by Otsu's threshold on grey.

    Args:
        images_B3HW: in [-1, 1].
        mode: the object is 1 darker, 2 brighter than the background; 3 the whole image.
    """
    if mode == 3:
        return torch.ones(images_B3HW.shape[0], *images_B3HW.shape[-2:], dtype=torch.bool)
    grey = ((TF.rgb_to_grayscale(images_B3HW)[:, 0] + 1) * 127.5).round().clamp(0, 255)
    threshold = torch.stack([otsu(image) for image in grey]).view(-1, 1, 1)
    return grey <= threshold if mode == 1 else grey > threshold


def otsu(grey_HW: Tensor) -> Tensor:
    """Otsu's threshold (scalar) of a grey image with values 0..255: the best split into values <= and > of it."""
    counts = torch.bincount(grey_HW.flatten().long(), minlength=256).double()
    levels = torch.arange(256, dtype=torch.float64, device=counts.device)
    below, total = counts.cumsum(0), counts.sum()
    mean_below = (counts * levels).cumsum(0)
    mean_all = mean_below[-1]
    # Between-class variance times total²; NaN if a class is empty.
    between = (mean_all * below - mean_below * total) ** 2 / (below * (total - below))
    return between.nan_to_num(nan=-1.0, posinf=-1.0).argmax().to(grey_HW.dtype)


def object_mask(images_B3HW: Tensor, mode: ForegroundMode, sigma: float = 6.0) -> Tensor:
    """The softened foreground that multiplies the final map, float [B, H, W] in [0, 1].

    A Gaussian blur (σ, cut at 4σ), everything above 0 set to 1, and the blur again: wider than the object, soft edges.
    """
    taps = 2 * int(4 * sigma + 0.5) + 1
    mask = foreground(images_B3HW, mode).to(images_B3HW.dtype)[:, None]
    wide = (TF.gaussian_blur(mask, [taps, taps], [sigma, sigma]) > 0).to(mask.dtype)
    return TF.gaussian_blur(wide, [taps, taps], [sigma, sigma])[:, 0].to(images_B3HW.device)
