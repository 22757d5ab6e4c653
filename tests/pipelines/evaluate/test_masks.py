"""Masks as people and programs write them: what is marked stays what it is."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from cluster.storage import Storage
from glad_core.decoding.picture import read_labels
from pipelines.archive.examples import Example
from pipelines.evaluate.masks import LOSSY, is_smeared, marked_in, read_mask, resize_mask

STORAGE = Storage()


def test_a_resized_mask_keeps_its_corner() -> None:
    whole = np.zeros((10, 20), bool)
    whole[:5, 10:] = True
    small = resize_mask(whole, (4, 4))
    assert small.tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


def test_a_defect_smaller_than_a_pixel_of_the_map_is_not_lost() -> None:
    whole = np.zeros((100, 200), bool)
    whole[99, 199] = whole[50, 3] = True
    assert np.argwhere(resize_mask(whole, (4, 8))).tolist() == [[2, 0], [3, 7]]
    assert not resize_mask(whole & False, (4, 8)).any()


MARK = np.zeros((40, 60), bool)
MARK[5:15, 10:20] = True


def mask_files():
    """Ways in which people write the same mask, by file name."""
    grey = MARK.astype(np.uint8)
    rgba = np.zeros((40, 60, 4), np.uint8)
    rgba[MARK, 0] = 255  # alpha 0 everywhere
    only_alpha = np.zeros((40, 60, 4), np.uint8)
    only_alpha[MARK, 3] = 255
    white = np.full((40, 60, 4), 255, np.uint8)  # a brush on a transparent sheet
    white[~MARK, 3] = 0
    palette = Image.fromarray(grey * 7)
    palette.putpalette([0, 0, 0] * 256)  # every label looks black
    return {
        "ones.png": Image.fromarray(grey),
        "sixteen.png": Image.fromarray((grey * 3).astype(np.uint16)),
        "thirty_two.tiff": Image.fromarray(grey.astype(np.int32) * 70_000),
        "float.tiff": Image.fromarray(grey.astype(np.float32)),
        "bits.png": Image.fromarray(MARK),
        "palette.png": palette,
        "rgb.png": Image.fromarray(np.stack([grey * 0, grey * 9, grey * 0], axis=2)),
        "rgba.png": Image.fromarray(rgba),
        "alpha.png": Image.fromarray(only_alpha),
        "white.png": Image.fromarray(white),
        "lossy.jpg": Image.fromarray(grey * 255),
        "labels.webp": Image.fromarray(np.stack([grey * 200] * 3, axis=2)),
        "cmyk.jpg": Image.fromarray(np.stack([grey * 255] * 3, axis=2)).convert("CMYK"),
        "nan.tiff": Image.fromarray(np.where(MARK, 1.0, np.nan).astype(np.float32)),
        "label.bmp": Image.fromarray(grey * 255),
    }


@pytest.mark.parametrize("name", mask_files())
def test_a_mask_is_read_however_it_is_written(name, tmp_path) -> None:
    options = {"quality": 90} if name.endswith("jpg") else {"lossless": True} if name.endswith("webp") else {}
    mask_files()[name].save(tmp_path / name, **options)
    example = Example("a", "a", "part", "test", True, (str(tmp_path / name),))
    mask = read_mask(example, STORAGE, [example])
    if name.endswith("jpg"):
        assert mask.doubts == (LOSSY,)
        assert (mask.marked != MARK).sum() < 20
    else:
        assert mask.doubts == ()
        assert (mask.marked == MARK).all()


def ellipse(side: int, scale: int = 1) -> Image.Image:
    """A filled ellipse on a canvas of ``side``, drawn at ``scale`` times the size."""
    image = Image.new("L", (side * scale, side * scale))
    ImageDraw.Draw(image).ellipse(
        [side * scale // 5, side * scale // 4, side * scale // 2, side * scale // 2], fill=255
    )
    return image


def compressed(image: Image.Image, quality: int, kind: str = "JPEG") -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, kind, quality=quality)
    return Image.open(stream)


SMALL = (128, 128)
LOSSY_MASKS = {f"jpeg {quality}": lambda q=quality: compressed(ellipse(128), q) for quality in (30, 75, 90, 98)}
LOSSY_MASKS |= {f"tiny jpeg {quality}": lambda q=quality: compressed(ellipse(16), q) for quality in (50, 75, 95)}
LOSSY_MASKS |= {f"drawn {n} times": lambda n=n: ellipse(128, n).resize(SMALL, Image.Resampling.BOX) for n in (2, 4, 8)}
LOSSY_MASKS |= {
    f"{way} {side}": lambda way=way, side=side: ellipse(side).resize(SMALL, Image.Resampling[way])
    for way in ("BILINEAR", "BICUBIC", "LANCZOS")
    for side in (32, 500)
}
LOSSY_MASKS |= {
    f"jpeg {quality} {n} times as large": lambda q=quality, n=n: Image.fromarray(
        np.kron(np.asarray(compressed(ellipse(128), q)), np.ones((n, n), np.uint8))
    )
    for quality, n in ((50, 4), (90, 2), (90, 3))
}
LOSSY_MASKS |= {f"webp {q}": lambda q=q: compressed(ellipse(128), q, "WEBP").convert("RGB") for q in (30, 60, 90)}
LOSSY_MASKS |= {
    "blurred": lambda: ellipse(128).filter(ImageFilter.GaussianBlur(4)),
    "colours": lambda: compressed(ellipse(128).convert("RGB"), 80).convert("RGB"),
    "sixteen": lambda: Image.fromarray(
        np.asarray(ellipse(128, 4).resize(SMALL, Image.Resampling.BOX), np.uint16) * 257
    ),
    "floats": lambda: Image.fromarray(np.asarray(ellipse(128).filter(ImageFilter.BoxBlur(2)), np.float32) / 255),
    "palette": lambda: ellipse(128, 4).resize(SMALL, Image.Resampling.BOX).quantize(64),
}


def saved(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "TIFF" if image.mode == "F" else "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("name", LOSSY_MASKS)
def test_a_mask_that_was_lossy_before_it_became_a_png_is_cut_at_half(name) -> None:
    image = LOSSY_MASKS[name]()
    marked, lossy = marked_in(*read_labels(saved(image)))
    assert lossy
    grey = np.asarray(image if image.mode in ("F", "I;16") else image.convert("L"), float)
    half = grey > grey.max() / 2
    assert (marked != half).mean() <= (0.001 if name in ("colours", "palette") or "webp" in name else 0)


def areas(labels, size: int, side: int = 128) -> np.ndarray:
    """Squares of these values at random places, later ones over earlier ones."""
    rng = np.random.default_rng(4)
    values = np.zeros((side, side), np.uint16 if max(labels) > 255 else np.uint8)
    for label in labels:
        top, left = rng.integers(0, side - size, 2)
        values[top : top + size, left : left + size] = label
    return values


def outlines(values, width: int) -> np.ndarray:
    image = Image.new("L", SMALL)
    rng = np.random.default_rng(5)
    for value in values:
        left, top = rng.integers(0, 90, 2)
        ImageDraw.Draw(image).ellipse([left, top, left + 30, top + 30], fill=value, outline=255, width=width)
    return np.asarray(image)


LABELS = {
    "classes": areas([1, 2, 3], 20),
    "zero and one": areas([1], 9),
    "repeated": np.kron(areas([20, 40, 60], 5, 32), np.ones((4, 4), np.uint8)),
    "instances": areas(range(1, 40), 12),
    "points": areas(range(1, 40), 1),
    "small": areas(range(1, 120), 3),
    "overlapping": areas(range(1, 200), 30),
    "spread": areas([50, 100, 150, 200, 250], 15),
    "sixteen bits": areas([300, 1000, 65535], 15),
    "many of sixteen bits": areas(range(1, 400), 9),
    "with an outline": outlines(range(1, 6), 3),
    "with a thin outline": outlines(range(1, 6), 1),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_label_image_stays_what_it_is(name) -> None:
    values = LABELS[name]
    marked, lossy = marked_in(*read_labels(saved(Image.fromarray(values))))
    assert not lossy
    assert (marked == (values != 0)).all()
    assert not is_smeared(values.astype(np.float32))


def test_the_background_of_a_palette_is_black_whatever_its_index() -> None:
    for indices, palette in (
        ((MARK == 0).astype(np.uint8), [255, 0, 0, 0, 0, 0]),  # 0 red, 1 black
        (MARK.astype(np.uint8) * 2, [0, 0, 0, 9, 9, 9, 0, 128, 0]),
        (MARK.astype(np.uint8) * 2, [9, 9, 9, 0, 0, 0, 9, 9, 9]),  # 0 and 2 look alike
        (MARK.astype(np.uint8) * 2, [30, 30, 30, 0, 0, 0, 200, 0, 0]),  # none that is used is black
    ):
        image = Image.fromarray(indices).convert("P")
        image.putpalette(palette)
        marked, lossy = marked_in(*read_labels(saved(image)))
        assert not lossy
        assert (marked == MARK).all()
