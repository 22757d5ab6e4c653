"""Training: speed of making anomalies, time spent waiting for data, categories side by side, a killed worker.

    python benchmarks/training.py [--json]

- ``synthesis_speedup``: `samples.make_rows` against a plain dataset item made image by image: list the texture folder,
  open a texture with PIL, augment it with PIL, draw Perlin noise with NumPy, blend. Same images, same textures, one
  thread, half of the images anomalous.
- ``data_wait_share``: share of a training step spent waiting for data, small model on demo boards, all CPUs.
- ``parallel_ratio``: time of two categories retrained side by side on 2 CPUs over that of one category on one core.
- ``rate_10000_over_400``: training speed on 10,000 pictures of 1024 x 768 over that on 400, small model, all CPUs.
- ``eight_categories_ok``: eight categories on 2 CPUs all reach the registry although one training worker is killed -9.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
import typer
from PIL import Image, ImageEnhance, ImageOps
from rich.console import Console

from glad_core.training import samples
from glad_core.training.recipe import Recipe
from pipelines.demo.boards import make_board

GLAD = [sys.executable, "-c", "from pipelines.cli.main import main; main()"]
SIDE, TEXTURES, IMAGES = 512, 5640, 64  # as many textures as DTD has
TRAIN_STEPS = 120
DRAWN = 200  # different pictures of a dataset, under many names
CATEGORY_STEPS = 40


def plain_perlin(side: int, cells: tuple[int, int]) -> np.ndarray:
    """Perlin noise in NumPy, the textbook way."""
    step = (cells[0] / side, cells[1] / side)
    grid = np.mgrid[0 : cells[0] : step[0], 0 : cells[1] : step[1]].transpose(1, 2, 0) % 1
    angles = 2 * np.pi * np.random.default_rng().random((cells[0] + 1, cells[1] + 1))
    gradients = np.dstack((np.cos(angles), np.sin(angles)))
    repeats = (side // cells[0], side // cells[1])
    corners = gradients.repeat(repeats[0], 0).repeat(repeats[1], 1)
    parts = []
    for down in (0, 1):
        for right in (0, 1):
            y, x = down * repeats[0], right * repeats[1]
            corner = corners[y : y + side, x : x + side]
            parts.append((np.dstack((grid[..., 0] - down, grid[..., 1] - right)) * corner).sum(2))
    fade = grid**3 * (grid * (grid * 6 - 15) + 10)
    top = parts[0] * (1 - fade[..., 0]) + fade[..., 0] * parts[2]
    bottom = parts[1] * (1 - fade[..., 0]) + fade[..., 0] * parts[3]
    return np.sqrt(2) * ((1 - fade[..., 1]) * top + fade[..., 1] * bottom)


def plain_item(path: Path, textures: Path) -> tuple[np.ndarray, np.ndarray]:
    """One dataset item made image by image, for comparison with the fast version."""
    image = np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    if random.random() < 0.5:
        return image, np.zeros((SIDE, SIDE), np.float32)
    noise = plain_perlin(SIDE, (2 ** random.randrange(6), 2 ** random.randrange(6)))
    noise = np.asarray(Image.fromarray(noise.astype(np.float32)).rotate(random.uniform(-180, 180)))
    mask = (noise > 0.3).astype(np.float32)[..., None]
    if random.random() < 0.5:
        names = sorted(textures.glob("**/*.jpg"))
        source = Image.open(random.choice(names)).convert("RGB").resize((SIDE, SIDE))
        source = np.asarray(plain_augmented(source))
    else:
        recoloured = np.asarray(plain_augmented(Image.fromarray(image)))
        piece = SIDE // 8
        pieces = [
            recoloured[y : y + piece, x : x + piece] for y in range(0, SIDE, piece) for x in range(0, SIDE, piece)
        ]
        random.shuffle(pieces)
        source = np.vstack([np.hstack(pieces[row * 8 : row * 8 + 8]) for row in range(8)])
    beta = 0.8 * random.random()
    mixed = (1 - mask) * image + mask * (beta * image + (1 - beta) * source.astype(np.float32))
    return mixed.astype(np.uint8), mask[..., 0]


def plain_augmented(image: Image.Image) -> Image.Image:
    changes = [
        lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(0.6, 1.4)),
        lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(0.5, 1.5)),
        lambda x: ImageEnhance.Color(x).enhance(random.uniform(0.5, 1.5)),
        lambda x: ImageEnhance.Sharpness(x).enhance(random.uniform(0, 2)),
        lambda x: ImageOps.solarize(x, random.randrange(128, 256)),
        ImageOps.autocontrast,
        ImageOps.equalize,
        lambda x: x.rotate(random.uniform(-45, 45)),
    ]
    for change in random.sample(changes, 3):
        image = change(image)
    return image


def synthesis(work: Path) -> dict[str, float]:
    """Images per second of both versions on the same files."""
    torch.set_num_threads(1)
    random.seed(0)
    rng = np.random.default_rng(0)
    textures = work / "textures"
    for number in range(TEXTURES):
        folder = textures / f"kind{number % 47:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        if number < 47:
            small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
            small.resize((480, 480), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
        else:
            (folder / f"{number}.jpg").hardlink_to(folder / f"{number % 47}.jpg")
    good = work / "good"
    good.mkdir()
    for number in range(IMAGES):
        board = Image.fromarray(make_board(np.random.default_rng(number))[0])
        board.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(good / f"{number}.png")
    files = sorted(good.iterdir())

    def rate(make: object, count: int) -> float:
        make(range(8))  # type: ignore[operator]
        started = time.perf_counter()
        make(range(count))  # type: ignore[operator]
        return count / (time.perf_counter() - started)

    def plain(positions: range) -> None:
        for position in positions:
            plain_item(files[position % IMAGES], textures)

    recipe = Recipe()
    # As in a task that makes data: images and textures are decoded once and kept.
    decoded = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    pool = [np.asarray(Image.open(path).resize((SIDE, SIDE))) for path in sorted(textures.glob("**/*.jpg"))[:500]]
    pool_tensor = torch.from_numpy(np.stack(pool))

    def fast(positions: range) -> None:
        for start in range(0, len(positions), 8):
            batch = positions[start : start + 8]
            chosen = [samples.sample_at(recipe, position, IMAGES) for position in batch]
            samples.make_rows([decoded[sample.index] for sample in chosen], chosen, recipe, "unet", pool_tensor)

    fast_rate, plain_rate = rate(fast, 256), rate(plain, 64)
    return {
        "synthesis_images_per_second": fast_rate,
        "plain_images_per_second": plain_rate,
        "synthesis_speedup": fast_rate / plain_rate,
    }


def dataset(work: Path, categories: int, images: int) -> Path:
    """An MVTec-AD tree of demo boards, one seed per category."""
    root = work / f"data{categories}"
    for category in range(categories):
        good = root / f"board{category}" / "train" / "good"
        good.mkdir(parents=True)
        for number in range(images):
            picture = make_board(np.random.default_rng(1000 * category + number))[0]
            Image.fromarray(picture).save(good / f"{number:03d}.png")
    return root


def data_wait(work: Path) -> dict[str, float]:
    """Waiting share and images/s of the steps after the first ten, from the run's own metrics."""
    run("train", dataset(work, 1, 60), "--out", work / "waits", "--steps", TRAIN_STEPS, "--seed", 0)
    rows = pq.read_table(work / "waits.training.parquet").to_pandas()[10:]
    seconds = 1 / rows.images_per_second
    share = float((rows.data_wait_share * seconds).sum() / seconds.sum())
    return {"data_wait_share": share, "training_images_per_second": float(1 / seconds.mean())}


def many(work: Path) -> dict[str, float]:
    """Images/s of the steps after the first ten, from the metrics of a run on few pictures and of one on many."""
    drawn = work / "drawn"
    drawn.mkdir()
    for number in range(DRAWN):
        board = Image.fromarray(make_board(np.random.default_rng(number))[0])
        board.resize((1024, 768), Image.Resampling.BICUBIC).save(drawn / f"{number}.jpg", quality=92)
    rates = {}
    for count in (400, 10_000):
        good = work / f"many{count}" / "board" / "train" / "good"
        good.mkdir(parents=True)
        for number in range(count):
            (good / f"{number:05}.jpg").hardlink_to(drawn / f"{number % DRAWN}.jpg")
        run("train", work / f"many{count}", "--out", work / f"of{count}", "--steps", TRAIN_STEPS, "--seed", 0)
        rows = pq.read_table(work / f"of{count}.training.parquet").to_pandas()[10:]
        rates[count] = float(1 / (1 / rows.images_per_second).mean())
    return {"rate_400": rates[400], "rate_10000": rates[10_000], "rate_10000_over_400": rates[10_000] / rates[400]}


def side_by_side(work: Path) -> dict[str, float]:
    """Two categories on both cores against one category confined to one core; each category does the same work."""
    data = dataset(work, 2, 20)
    options = ["--steps", CATEGORY_STEPS]
    alone = []
    for category in ("board0", "board1"):
        out = work / f"alone-{category}"
        alone.append(run("retrain", data, "--categories", category, "--out", out, *options, core=0))
    together = run("retrain", data, "--out", work / "together", *options)
    return {"alone_seconds": max(alone), "together_seconds": together, "parallel_ratio": together / max(alone)}


def eight(work: Path) -> dict[str, object]:
    """Eight categories, one of whose training workers is killed -9."""
    data = dataset(work, 8, 8)
    command = [*GLAD, "retrain", data, "--out", work / "eight", "--steps", 10, "--batch-size", 8]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    killed: list[int] = []

    def kill_one() -> None:
        while process.poll() is None and not killed:
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    if "RayTrainWorker" in " ".join(child.cmdline()):
                        time.sleep(8)
                        child.send_signal(signal.SIGKILL)
                        killed.append(child.pid)
                        break
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.1)

    thread = threading.Thread(target=kill_one, daemon=True)
    thread.start()
    started = time.perf_counter()
    output, _ = process.communicate()
    current = list((work / "eight").glob("board*/current.json"))
    succeeded = process.returncode == 0 and len(current) == 8 and bool(killed)
    if not succeeded:
        print(output)
    return {"eight_seconds": time.perf_counter() - started, "killed": len(killed), "eight_categories_ok": succeeded}


def run(*arguments: object, core: int | None = None) -> float:
    """Seconds that a `glad` command takes, on one core only if ``core`` is given; its failure ends the benchmark."""

    def confine() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})

    started = time.perf_counter()
    process = subprocess.run([*GLAD, *map(str, arguments)], preexec_fn=confine, capture_output=True, text=True)
    if process.returncode != 0:
        raise SystemExit(process.stdout + process.stderr)
    return time.perf_counter() - started


def main(as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False) -> None:
    """Measure and print."""
    work = Path(tempfile.mkdtemp(prefix="glad-bench-"))
    figures: dict[str, object] = {}
    try:
        for part in (synthesis, data_wait, many, side_by_side, eight):
            figures |= part(work)
            Console(stderr=True).print({name: figures[name] for name in list(figures)})
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(figures) if as_json else "\n".join(f"{name:28} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
