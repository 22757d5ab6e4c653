"""Images as arrays: the resize of every image, and the value range of the networks.

Shapes: H W source size, R the bundle's resolution, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] to uint8 [size, size, 3]: bilinear, antialiased when shrinking; the aspect ratio is not kept.

    Pillow's filter, as in the authors' data loader; an image of that size is returned unchanged.
    """
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 [R, R, 3] images of one size to float32 [B, 3, R, R] in [-1, 1]."""
    import torch  # here: tasks that only decode images start seconds sooner without it

    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
