"""Pictures larger than the model sees: what tiles find, what they cost, and whether a defect on a seam is seen.

    python benchmarks/tiles.py [--json] [--only NAME ...] [--train 40] [--good 60] [--bad 60] [--steps 300]

Boards of 1024 x 768 pixels under four lights, with defects of 4 to 40 pixels across; the models see 128 x 128.

recall_nearest_tiles, recall_nearest_squash    share of defective boards above 99 % of the good ones: nearest neighbour
                          on the small bundle's features, through whole and tiles at the boards' scale, and whole alone
recall_tiles, recall_squash    the same of GLAD, trained on the same boards: the views that training chose, and squash
seam                      largest change of the score when one defect is moved by ten pixels, across seams too, divided
                          by the score that 1 % of good boards exceed; between two rows of parts, over tracks
seam_of_score             the same change divided by the defect's smallest score
seam_over_threshold       the defect's smallest score, divided by the score that 1 % of good boards exceed
equal                     scores of other batch sizes and orders are the same within rounding
large_mb                  memory that one 100 MP picture adds: of its decoder's process and of the process beside it,
                          which then cuts and stitches it
tiles_over_images         tiles judged per second of pictures that are cut, divided by images per second of as many
                          squashed ones: what cutting and stitching cost
"""

import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from PIL import Image, ImageDraw, ImageFilter
from rich.console import Console

from cluster import session
from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description, with_settings
from glad_core.bundle.settings import Settings, View
from pipelines.models.variant import write_variant
from pipelines.runs.run import Run
from pipelines.score.job import score
from pipelines.score.request import ScoreRequest
from pipelines.train.job import train
from pipelines.train.plan import TrainRequest

WIDTH, HEIGHT = 1024, 768
LIGHTS = [(1.0, 1.0, 1.0), (0.75, 0.78, 0.85), (1.15, 1.1, 1.0), (0.9, 0.95, 0.8)]
TILES = (View(), View(kind="tiles"))
QUIET = Console(quiet=True)


def board(seed: int, defect: tuple[int, int, int] | None = None) -> Image.Image:
    """A board: pads, tracks and chips in their places, moved by a few pixels; light and noise are the picture's own.

    Args:
        defect: x, y and diameter of a spot, pixels.
    """
    layout, rng = np.random.default_rng(7), np.random.default_rng(seed)
    picture = Image.new("RGB", (WIDTH, HEIGHT), (24, 92, 52))
    draw = ImageDraw.Draw(picture)
    shift = rng.integers(-3, 4, 2)
    for x in range(40, WIDTH, 64):
        colour = tuple(int(v) for v in layout.integers(90, 130, 3))
        draw.line([(x + shift[0], 0), (x + shift[0], HEIGHT)], fill=colour, width=3)
    for y in range(32, HEIGHT, 96):
        for x in range(48, WIDTH, 128):
            w, h = (int(v) for v in layout.integers(20, 52, 2))
            dark = int(layout.integers(20, 60))
            left, top = x + int(shift[0]) + int(rng.integers(-1, 2)), y + int(shift[1]) + int(rng.integers(-1, 2))
            draw.rectangle([left, top, left + w, top + h], fill=(dark, dark, dark + 8))
            draw.ellipse([left - 14, top, left - 4, top + 10], fill=(205, 190, 120))
    if defect is not None:
        x, y, size = defect
        around = np.asarray(picture.crop((x - size, y - size, x + size, y + size)), float).mean()
        tone = (235, 230, 225) if around < 110 else (8, 10, 8)  # what people can see
        draw.ellipse([x - size / 2, y - size / 2, x + size / 2, y + size / 2], fill=tone)
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.6)), float)
    light = np.array(LIGHTS[seed % len(LIGHTS)]) * (1 + 0.1 * np.linspace(-1, 1, WIDTH))[None, :, None]
    noisy = blurred * light + rng.normal(0, 3, blurred.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def draw_boards(folder: Path, training: int, good: int, bad: int) -> None:
    for number in range(training):
        save(board(number), folder / f"board/train/good/{number:03d}.png")
    for number in range(good):
        save(board(10_000 + number), folder / f"board/test/good/{number:03d}.png")
    rng = np.random.default_rng(3)
    for number in range(bad):
        size = int(np.geomspace(4, 40, bad)[number].round())
        place = (int(rng.integers(40, WIDTH - 40)), int(rng.integers(40, HEIGHT - 40)), size)
        save(board(20_000 + number, place), folder / f"board/test/spot/{number:03d}.png")


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def bundle_with(folder: Path, views: tuple[View, ...], base: str = "small") -> str:
    """The base bundle with other views."""
    from pipelines.models.find import describe

    known = describe(base, Storage())
    settings = Settings.parse(known.settings, base).model_copy(
        update={"views": views, "threshold": None, "picture_size": (HEIGHT, WIDTH)}
    )
    if not (folder / "glad.json").exists():
        write_variant(base, with_settings(known, settings, {}), str(folder), Storage())
    return str(folder)


def scores(source: Path, out: Path, model: str, **options: Any) -> dict[str, float]:
    """Scores of a job by the end of the URI."""
    score(ScoreRequest(str(source), str(out), model=model, **options), QUIET)
    table = Run.at(str(out)).results().to_table(columns=["uri", "score"])
    return dict(
        zip(("/".join(u.split("/")[-2:]) for u in table["uri"].to_pylist()), table["score"].to_pylist(), strict=True)
    )


def recall(found: dict[str, float]) -> float:
    """Share of defective pictures above 99 % of the good ones."""
    good = [value for name, value in found.items() if name.startswith("good/")]
    bad = [value for name, value in found.items() if not name.startswith("good/")]
    return float(np.mean(np.array(bad) > np.quantile(good, 0.99)))


def nearest(folder: Path, **_: int) -> dict[str, float]:
    figures = {}
    for name, views in (("squash", TILES[:1]), ("tiles", TILES)):
        model = bundle_with(folder / f"nearest-{name}-bundle", views)
        options = {"method": "nearest", "good": str(folder / "board/train/good")}
        figures[f"recall_nearest_{name}"] = recall(
            scores(folder / "board/test", folder / f"n-{name}", model, **options)
        )
        print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def seam(folder: Path, **_: int) -> dict[str, float]:
    """A spot of 24 pixels between two rows of parts, moved across the edges of tiles, judged through tiles alone."""
    for x in range(60, 200, 10):
        save(board(10_001, (x, 107, 24)), folder / f"seam/spot/{x:03d}.png")
    model = bundle_with(folder / "seam-bundle", TILES[1:])
    options = {"method": "nearest", "good": str(folder / "board/train/good")}
    values = [value for _, value in sorted(scores(folder / "seam", folder / "s", model, **options).items())]
    good = scores(folder / "board/test/good", folder / "s-good", model, **options).values()
    threshold = float(np.quantile(list(good), 0.99))
    change = float(np.abs(np.diff(values)).max())
    return {
        "seam": change / threshold,
        "seam_of_score": change / min(values),
        "seam_over_threshold": min(values) / threshold,
    }


def glad(folder: Path, *, steps: int, **_: int) -> dict[str, float]:
    figures: dict[str, Any] = {}
    for name, views in (("squash", TILES[:1]), ("tiles", None)):
        out = folder / f"glad-{name}"
        recipe = {"steps": steps, "seed": 0}
        if not out.exists():
            train(TrainRequest(str(folder / "board"), None, "small", str(out), recipe, views=views), QUIET)
        kept = read_description(out).settings["views"]
        figures[f"views_{name}"] = [(view["kind"], view["scale"]) for view in kept]
        started = time.perf_counter()
        figures[f"recall_{name}"] = recall(scores(folder / "board/test", folder / f"g-{name}", str(out)))
        figures[f"seconds_{name}"] = time.perf_counter() - started
        print(json.dumps(figures), file=sys.stderr, flush=True)
    return figures


def equal(folder: Path, **_: int) -> dict[str, Any]:
    """Twelve boards, each way; the order of an archive follows its names."""
    views = (View(), View(kind="tiles", scale=0.4))
    model = bundle_with(folder / "equal-bundle", views)
    runs = []
    for number, (batch, actors) in enumerate(((8, 1), (3, 2))):
        source = folder / f"equal{number}"
        for index in range(6):
            save(board(index, (300, 300, 20)), source / f"good/{index if number == 0 else 5 - index}.png")
        runs.append(scores(source, folder / f"e{number}", model, batch_size=batch, actors=actors))
    pairs = [(runs[0][f"good/{index}.png"], runs[1][f"good/{5 - index}.png"]) for index in range(6)]
    difference = max(abs(a - b) for a, b in pairs)
    return {"equal": difference < 1e-3, "equal_difference": difference}


def large(folder: Path, **_: int) -> dict[str, float]:
    """Decode one JPEG of 10,000 x 10,000 through the decoder process, cut it, and stitch it from made-up verdicts."""
    from glad_core.stitch import stitch, tile_requests
    from glad_core.verdict import Detection
    from pipelines.archive.decode import DECODED_SCHEMA, _decode_row
    from pipelines.score.actor import NOTHING, _frames

    settings = Settings(resolution=512, feature_resolution=512, views=TILES)
    stream = io.BytesIO()
    tile = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(np.tile(tile, (20, 20, 1))).save(stream, "JPEG", quality=70)
    data = stream.getvalue()
    del stream
    _decode_row({}, _jpeg(np.zeros((64, 64, 3), np.uint8)), settings.framings(), 20)  # starts the process
    process = psutil.Process()
    children = process.children()
    before = [each.memory_info().rss for each in (process, *children)]
    peaks, stop = list(before), threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            for number, each in enumerate((process, *children)):
                peaks[number] = max(peaks[number], each.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    import pyarrow as pa

    row = _decode_row({"image_id": "a", "uri": "a"}, data, settings.framings(), 20)
    assert row.get("error_type") is None, row
    table = pa.Table.from_pylist([row], schema=DECODED_SCHEMA)
    del row
    size = (10_000, 10_000)
    requests = tile_requests("a", _frames(table["image"][0], settings, size), settings, size)
    anomaly_map = np.random.default_rng(0).random((64, 64)).astype(np.float16)
    made = [[Detection("a", 0.5, None, "none", [], anomaly_map, NOTHING, 0.1) for _ in view] for view in requests]
    stitch(settings, size, made, keep_reconstruction=False)
    stop.set()
    watcher.join()
    grown = [(peak - start) / 2**20 for peak, start in zip(peaks, before, strict=True)]
    return {"large_mb": max(grown), "large_mb_each": grown, "large_tiles": len(requests[1])}  # type: ignore[dict-item]


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def speed(folder: Path, **_: int) -> dict[str, float]:
    """Tiles per second within an actor's engine thread, against as many squashed images."""
    views = (View(kind="tiles", scale=0.4, overlap=0.25),)
    rates = {}
    count = len(Settings(resolution=128, views=views).framings()[0].places(HEIGHT, WIDTH))
    for name, chosen, images in (("tiles", views, 24), ("images", TILES[:1], 24 * count)):
        source = folder / f"speed-{name}"
        for number in range(images):
            save(board(number) if name == "tiles" else board(number).resize((128, 128)), source / f"{number:04d}.png")
        model = bundle_with(folder / f"speed-{name}-bundle", chosen)
        best = 0.0
        for attempt in range(2):
            out = folder / f"speed-{name}-{attempt}"
            score(ScoreRequest(str(source), str(out), model=model), QUIET)
            best = max(best, 24 * count / Run.at(str(out)).record["seconds"])
        rates[name] = best
    return {
        "tiles_per_second": rates["tiles"],
        "images_per_second": rates["images"],
        "tiles_over_images": rates["tiles"] / rates["images"],
    }


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "nearest": nearest,
    "seam": seam,
    "glad": glad,
    "equal": equal,
    "large": large,
    "speed": speed,
}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object as the last line")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(MEASURES)}; may be repeated")] = None,
    training: Annotated[int, typer.Option("--train", help="good boards to learn from")] = 40,
    good: Annotated[int, typer.Option(help="good boards of the test")] = 60,
    bad: Annotated[int, typer.Option(help="defective boards of the test")] = 60,
    steps: Annotated[int, typer.Option(help="of each training")] = 300,
) -> None:
    """Measure and print."""
    os.environ |= session.QUIET
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="t", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        draw_boards(folder, training, good, bad)
        for part in only or MEASURES:
            figures |= MEASURES[part](folder, steps=steps)
            print(json.dumps(figures), file=sys.stderr, flush=True)
        session.disconnect()
    print(json.dumps(figures) if as_json else "\n".join(f"{name:25} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    typer.run(main)
