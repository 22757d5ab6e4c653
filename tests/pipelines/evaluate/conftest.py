"""A dataset and a finished run over it, for the tests of tallies and tables."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from glad_core.bundle.glad_json import read_description
from pipelines.runs.schema import RESULTS_SCHEMA

SIDE = 32


@pytest.fixture
def scored(tmp_path: Path, tiny_bundle) -> tuple[Path, Path, list[dict]]:
    """A dataset, and a finished run over it whose maps are at full size."""
    rng = np.random.default_rng(0)
    rows = []
    for category in ("bottle", "cable"):
        root = tmp_path / "data" / category
        for split, kind, count in (("train", "good", 1), ("test", "good", 5), ("test", "cut", 4)):
            for number in range(count):
                image = root / split / kind / f"{number:03d}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(image)
                if split == "train":
                    continue
                anomaly_map = rng.random((SIDE, SIDE))
                mask = np.zeros((SIDE, SIDE), bool)
                if kind == "cut":
                    y, x = rng.integers(0, SIDE - 8, 2)
                    mask[y : y + 7, x : x + 5] = True
                    file = root / "ground_truth" / kind / f"{number:03d}_mask.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(file)
                    anomaly_map += 0.5 * mask
                anomaly_map = anomaly_map.astype(np.float16)
                rows.append(
                    {"uri": str(image), "category": category, "score": float(anomaly_map.max()) + rng.normal() / 5}
                    | {"anomaly_map": anomaly_map.ravel(), "map_height": SIDE, "map_width": SIDE, "mask": mask}
                )
    run = tmp_path / "run"
    (run / "results").mkdir(parents=True)
    table = pa.Table.from_pylist(
        [{k: v for k, v in row.items() if k != "mask"} | {"image_id": row["uri"]} for row in rows],
        schema=RESULTS_SCHEMA,
    )
    pq.write_table(table, run / "results" / "part-0.parquet")
    description = read_description(tiny_bundle)
    record = {"models": {"": {"model_id": description.model_id, "settings": description.settings}}, "counts": {}}
    (run / "run.json").write_text(json.dumps(record))
    return run, tmp_path / "data", rows
