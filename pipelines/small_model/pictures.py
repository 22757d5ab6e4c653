"""The small model's training pictures: demo boards, crops of photos from Python packages, drawn textures.

The boards are good ones with a seed of their own, never those that `glad demo-data` writes.

Legend: B batch, N pool size.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from glad_core.images import resize, to_tensor
from pipelines.demo.boards import board_rng, make_board

SIDE = 128
BOARD_SEED = 1000  # no seed that a user is likely to make demo data with
# Colour and grey photos in the wheel of scikit-image; scikit-learn adds two.
PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
    *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png"),
    *("page.png", "retina.jpg", "rocket.jpg", "text.png"),
)


def board_picture(index: int, seed: int = BOARD_SEED, split: str = "train") -> np.ndarray:
    """One demo board at the model's size, uint8 [128, 128, 3]; ``split`` is 'train', 'good' or a defect."""
    image, _ = make_board(board_rng(seed, split, index), None if split in ("train", "good") else split)
    return resize(image, SIDE)


def package_photos() -> list[np.ndarray]:
    """The photos inside scikit-image and scikit-learn, uint8 RGB of many sizes."""
    import skimage
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    photos = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOS]
    return photos + list(load_sample_images().images)


def photo_crop(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """A random square of a photo at a random scale with random light, sometimes grey: uint8 [128, 128, 3]."""
    limit = min(photo.shape[:2])
    side = int(rng.uniform(min(80, limit), min(limit, 420)))
    top, left = rng.integers(photo.shape[0] - side + 1), rng.integers(photo.shape[1] - side + 1)
    crop = Image.fromarray(photo[top : top + side, left : left + side]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    coloured = np.asarray(crop if rng.random() < 0.75 else crop.convert("L").convert("RGB"))
    picture = coloured * rng.uniform(0.6, 1.25) * (1 + rng.uniform(-0.15, 0.15, 3)) + rng.uniform(-25, 25)
    return np.clip(picture, 0, 255).astype(np.uint8)


def texture(rng: np.random.Generator) -> np.ndarray:
    """Noise with a random spectrum and grain direction (stone, cloth, brushed metal) and some flat shapes on it."""
    fy, fx = np.meshgrid(np.fft.fftfreq(SIDE), np.fft.fftfreq(SIDE), indexing="ij")
    angle, stretch = rng.uniform(0, pi), np.exp(rng.uniform(0, 2.5))
    along, across = cos(angle) * fx + sin(angle) * fy, stretch * (cos(angle) * fy - sin(angle) * fx)
    amplitude = (along**2 + across**2 + 1e-4) ** (-rng.uniform(0.4, 1.3))
    field = np.fft.ifft2(np.fft.fft2(rng.normal(size=(SIDE, SIDE))) * amplitude).real
    field = (field - field.mean()) / field.std()
    grey = rng.random() < 0.4
    base = np.full(3, rng.uniform(40, 210)) if grey else rng.uniform(20, 230, 3)
    tint = np.ones(3) if grey else rng.uniform(0.5, 1.2, 3)
    picture = Image.fromarray(np.clip(base + rng.uniform(3, 35) * field[..., None] * tint, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 9)):
        x, y = rng.uniform(0, SIDE, 2)
        w, h = rng.uniform(3, 40, 2)
        fill = tuple(int(c) for c in rng.uniform(0, 255, 3))
        [draw.ellipse, draw.rectangle][rng.integers(2)]((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=fill)
    return np.asarray(picture)


def make_pool(path: Path, boards: int = 700, photos: int = 2400, textures: int = 500) -> dict[str, np.ndarray]:
    """The pool of pictures by kind, each uint8 [N, 128, 128, 3]; drawn once, then read from ``path`` (.npz)."""
    if not path.exists():
        rng = np.random.default_rng(0)
        sources = package_photos()
        pool = {
            "boards": np.stack([board_picture(index) for index in range(boards)]),
            "photos": np.stack([photo_crop(rng, sources[k % len(sources)]) for k in range(photos)]),
            "textures": np.stack([texture(rng) for _ in range(textures)]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, allow_pickle=False, **pool)
        partial.replace(path)
    with np.load(path) as stored:
        return {kind: stored[kind] for kind in stored.files}


def _blemish(rng: np.random.Generator, picture: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Put strokes, patches or dots into a picture, so that codec and features also preserve what no board has."""
    canvas, side = Image.fromarray(picture), picture.shape[0]
    cover = Image.new("L", canvas.size, 0)
    draw, kind, opacity = ImageDraw.Draw(cover), rng.integers(3), int(rng.uniform(120, 256))
    for _ in range(rng.integers(1, 4)):
        x, y, u, v = rng.uniform(0, side, 4)
        if kind == 0:
            draw.line((x, y, u, v), fill=opacity, width=int(rng.integers(1, 4)))
        else:
            w, h = rng.uniform(3, side / 3, 2)
            [draw.ellipse, draw.rectangle][kind - 1]((x - w / 2, y - h / 2, x + w / 2, y + h / 2), fill=opacity)
    if rng.random() < 0.5:
        canvas.paste(tuple(int(c) for c in rng.uniform(0, 255, 3)), (0, 0), cover)
    else:
        canvas.paste(Image.fromarray(other), (0, 0), cover)
    return np.asarray(canvas)


def batches(
    pool: dict[str, np.ndarray], size: int, side: int, seed: int, shares: tuple[float, float, float] = (0.5, 0.35, 0.15)
) -> Iterator[Tensor]:
    """Endless random batches: crops of ``side``, flipped and turned, half of them blemished.

    Yields:
        float32 [B, 3, side, side] in [-1, 1]; ``shares`` are those of boards, photos and textures.
    """
    rng = np.random.default_rng(seed)
    kinds = list(pool)

    def crop() -> np.ndarray:
        pictures = pool[kinds[rng.choice(len(kinds), p=shares)]]
        top, left = rng.integers(SIDE - side + 1, size=2)
        picture = pictures[rng.integers(len(pictures)), top : top + side, left : left + side]
        picture = np.rot90(picture, int(rng.integers(4)))
        return np.ascontiguousarray(picture[:, :: rng.choice([-1, 1])])

    while True:
        pictures = [crop() for _ in range(size)]
        pictures = [_blemish(rng, p, crop()) if rng.random() < 0.5 else p for p in pictures]
        yield to_tensor(pictures)
