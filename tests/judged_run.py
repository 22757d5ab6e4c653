"""A finished run with results of every kind, for tests of what reads runs: search, feedback, report, server."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description
from pipelines.runs.claim import claim, draft
from pipelines.runs.commits import Written, commit_shards, complete
from pipelines.runs.run import Run
from pipelines.runs.schema import SCORED_SCHEMA
from pipelines.runs.write import ResultsWriter, new_staging

SIDE = 32  # of the maps
HOSTILE = "<img src=x onerror=hacked=1><script>&.png"
THRESHOLDS = {"bottle": 1.0, "cable": 0.5}
STEPS = (350, 250, 150)


class JudgedRun(NamedTuple):
    """A run, its dataset with ground truth, and the rows of its results in the order of their image ids."""

    run: Run
    data: Path
    rows: list[dict]


def make_judged_run(root: Path, bundle: Path) -> JudgedRun:
    """Two categories with 18 good images, of which one is a false alarm, and 12 with a cut, of which one is missed.

    One name is hostile to HTML, the last image is overwritten after it was judged, and one image was not judged.
    """
    rng = np.random.default_rng(1)
    model = read_description(bundle)
    rows: list[dict] = []
    for category, threshold in THRESHOLDS.items():
        draw_image(rng, root / "data" / category / "train/good/000.png")
        for kind, number in (("good", 18), ("cut", 12)):
            for index in range(number):
                row = judged_image(rng, root / "data" / category, kind, index, threshold)
                rows.append(row | {"image_id": f"{len(rows):032d}", "category": category, "position": len(rows)})
                rows[-1]["model_id"] = model.model_id
    Path(rows[-1]["uri"]).write_text("overwritten since")
    failed = {"image_id": "e", "uri": "/archive/broken.png", "stage": "decode", "error_type": "damaged"}
    failed |= {"message": "not a picture", "position": len(rows)}

    run = Run(str(root / "run"), Storage())
    models = {"": {"model_id": model.model_id, "settings": model.settings}}
    record = {"models": models, "source": "the/archive", "seconds": 30.0}
    record |= {"counts": {"scored": len(rows), "errors": 1}}
    manifest = [{"image_id": row["image_id"], "uri": row["uri"], "size": None, "shard": None} for row in rows]
    finish_run(run, pa.Table.from_pylist([*rows, failed], schema=SCORED_SCHEMA), pa.Table.from_pylist(manifest), record)
    return JudgedRun(run, root / "data", rows)


def finish_run(run: Run, scored: pa.Table, manifest: pa.Table, record: dict) -> None:
    """Write a finished run as `glad score` does: claim, stage, commit, complete."""
    plan = claim(run, 1, lambda listing: draft([len(scored)], listing, None, {}, 512))
    folder = Path(run.path("manifest", plan.listing))
    folder.mkdir(parents=True)
    pq.write_table(manifest, folder / "part-0.parquet")
    write = ResultsWriter(run, plan.rows_per_shard, plan.generation, new_staging(plan.generation))
    pieces = [
        Written(**row | {name: tuple(row[name]) for name in ("files", "sizes")}) for row in write(scored).to_pylist()
    ]
    commits = {commit.shard: commit for _, commit in commit_shards(run, plan, pieces) if commit is not None}
    complete(run, plan, commits, record)


def judged_image(rng: np.random.Generator, category: Path, kind: str, index: int, threshold: float) -> dict:
    """Draw an image, and its mask if it has a cut; returns its result without the fields that do not depend on it."""
    name = HOSTILE if (category.name, kind, index) == ("cable", "cut", 3) else f"{index:03d}.png"
    image = draw_image(rng, category / "test" / kind / name)
    anomaly_map = rng.random((SIDE, SIDE)) * 0.3 * threshold
    score, p_value = threshold * rng.uniform(0.2, 0.95), 0.5 if category.name == "bottle" else None
    if kind == "cut":
        mask = np.zeros((SIDE, SIDE), np.uint8)
        mask[8:20, 10:24] = 255
        mask_file = category / "ground_truth" / kind / f"{image.stem}_mask.png"
        mask_file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(mask_file, "PNG")
        score = threshold * (0.4 if index == 0 else rng.uniform(1.05, 3))
        anomaly_map[8:20, 10:24] = score
    elif index == 1:
        score = threshold * 1.2
    step = int(rng.choice(STEPS))
    return {
        "uri": str(image),
        "score": score,
        "threshold": threshold,
        "is_anomalous": score > threshold,
        "p_value": p_value,
        "stop_step": step,
        "stop_reason": "min_step" if step == STEPS[-1] else "difference",
        "steps": [{"timestep": t, "score": 0.001 * (500 - t)} for t in STEPS if t >= step],
        "anomaly_map": anomaly_map.astype(np.float16).ravel(),
        "map_height": SIDE,
        "map_width": SIDE,
        "reconstruction": image.read_bytes(),
        "width": 60,
        "height": 40,
        "seconds": 0.5,
    }


def draw_image(rng: np.random.Generator, path: Path) -> Path:
    """Write a PNG of noise, 60 x 40 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path, "PNG")
    return path
