"""Small datasets in the layouts of MVTec-AD and VisA: two categories with a training image and two test images each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 10)  # width and height of every image, pixels
MARKED = 6  # anomalous pixels of a mask


def draw_mvtec(root: Path) -> Path:
    """`bottle` and `cable`."""
    for category in ("bottle", "cable"):
        draw_image(root / category / "train/good/000.png")
        draw_image(root / category / "test/good/000.png")
        draw_image(root / category / "test/broken/000.png")
        draw_mask(root / category / "ground_truth/broken/000_mask.png")
    return root


def draw_visa(root: Path) -> Path:
    """`pcb1` and `pcb2`; their masks hold class numbers."""
    lines = ["object,split,label,image,mask"]
    for category in ("pcb1", "pcb2"):
        for split, label, name in (("train", "normal", "0"), ("test", "normal", "1"), ("test", "anomaly", "2")):
            image = f"{category}/Data/Images/{'Normal' if label == 'normal' else 'Anomaly'}/{name}.JPG"
            draw_image(root / image)
            mask = f"{category}/Data/Masks/Anomaly/{name}.png" if label == "anomaly" else ""
            if mask:
                draw_mask(root / mask, value=1)
            lines.append(f"{category},{split},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def draw_image(path: Path) -> None:
    """Write a grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, "grey").save(path)


def draw_mask(path: Path, size: tuple[int, int] = SIZE, value: int = 255) -> None:
    """Write a mask in which `MARKED` pixels have a ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[2:4, 3:6] = value
    Image.fromarray(pixels).save(path)
