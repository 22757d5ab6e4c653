import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn import metrics as sk
from typer.testing import CliRunner

from cluster.storage import Storage
from glad_core.bundle.glad_json import read_description
from glad_core.errors import GladError
from pipelines.cli.main import app
from pipelines.evaluate.datasets import read_dataset
from pipelines.evaluate.tables import Tally, count_batch, find_example
from pipelines.runs.schema import RESULTS_SCHEMA, read_run

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
                    place = root / "ground_truth" / kind / f"{number:03d}_mask.png"
                    place.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(place)
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


@pytest.mark.slow
def test_the_table_is_what_scikit_learn_says(scored, tmp_path, ray_session) -> None:
    run, data, rows = scored
    extra = data / "cable/test/good/099.png"
    extra.write_bytes((data / "cable/test/good/000.png").read_bytes())  # never scored
    outcome = CliRunner().invoke(app, ["evaluate", str(run), "--dataset", str(data), "--out", str(tmp_path / "tables")])
    assert outcome.exit_code == 0, outcome.output
    ours = json.loads((tmp_path / "tables/metrics.json").read_text())["ours"]
    assert list(ours) == ["bottle", "cable", "average"]
    for category in ("bottle", "cable"):
        mine = [row for row in rows if row["category"] == category]
        labels = ["/cut/" in row["uri"] for row in mine]
        scores = [np.float32(row["score"]) for row in mine]
        maps = np.concatenate([row["anomaly_map"] for row in mine]).astype(np.float64)
        masks = np.concatenate([row["mask"].ravel() for row in mine])
        expected = {
            "I-AUROC": sk.roc_auc_score(labels, scores),
            "I-AP": sk.average_precision_score(labels, scores),
            "P-AUROC": sk.roc_auc_score(masks, maps),
            "P-AP": sk.average_precision_score(masks, maps),
        }
        for name, value in expected.items():
            assert ours[category][name] == pytest.approx(value, abs=1e-6), name
        assert ours[category]["I-AUROC low"] <= ours[category]["I-AUROC"] <= ours[category]["I-AUROC high"]
    assert ours["average"]["PRO"] == pytest.approx((ours["bottle"]["PRO"] + ours["cable"]["PRO"]) / 2)
    assert "1 of 19 test images have no result" in outcome.stdout
    assert "Published, MVTec-AD" in outcome.stdout  # both are MVTec-AD's
    assert "99.1/99.6/98.1" in outcome.stdout  # PatchCore
    assert (tmp_path / "tables/metrics.csv").read_text().startswith("category,I-AUROC,I-AP,I-F1-max,P-AUROC")
    assert (tmp_path / "tables/metrics.md").read_text().count("\n") == 5


def test_any_batches_give_the_same_tallies(scored) -> None:
    import pickle
    import zlib

    run, data, rows = scored
    record = read_run(str(run), Storage())
    examples = read_dataset(str(data), Storage())
    columns = ("uri", "category", "score", "anomaly_map", "map_height", "map_width")

    def tallied(sizes: list[int]) -> dict[str, dict[str, float]]:
        total: dict[str, Tally] = {}
        start = 0
        for size in sizes:
            part = rows[start : start + size]
            batch = {name: np.array([row[name] for row in part]) for name in columns}
            (packed,) = count_batch(batch, record, examples, Storage())["tallies"]
            for name, tally in pickle.loads(zlib.decompress(packed)).items():
                total[name] = total.get(name, Tally()).merge(tally)
            start += size
        return {name: tally.metrics() for name, tally in total.items()}

    assert tallied([18]) == tallied([9, 9]) == tallied([1, 2, 3, 4, 5, 2, 1])


def test_a_missing_mask_is_counted_and_left_out(scored) -> None:
    import pickle
    import zlib

    run, data, rows = scored
    (data / "bottle/ground_truth/cut/000_mask.png").unlink()
    columns = ("uri", "category", "score", "anomaly_map", "map_height", "map_width")
    batch = {name: np.array([row[name] for row in rows]) for name in columns}
    examples = read_dataset(str(data), Storage())
    (packed,) = count_batch(batch, read_run(str(run), Storage()), examples, Storage())["tallies"]
    bottle = pickle.loads(zlib.decompress(packed))["bottle"]
    assert bottle.without_mask == 1
    assert len(bottle.images) == 9
    assert bottle.pixels.normal.sum() + bottle.pixels.anomalous.sum() == 8 * SIDE * SIDE


def test_results_find_their_image_wherever_the_archive_was(scored) -> None:
    _, data, _ = scored
    truth = {example.path: example for example in read_dataset(str(data), Storage())}
    for uri in ("s3://bucket/copy/cable/test/cut/001.png", "/elsewhere/cable/test/cut/001.png"):
        assert find_example(uri, truth).path == "cable/test/cut/001.png"
    with pytest.raises(GladError, match="not in the dataset"):
        find_example("/elsewhere/screw/test/cut/001.png", truth)
