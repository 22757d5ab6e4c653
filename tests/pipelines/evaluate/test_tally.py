"""Tallies: exact whatever the batches, and honest about what they leave out."""

import numpy as np
import pytest

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive.layouts import read_dataset
from pipelines.evaluate.tally import Tally, count_batch, find_example, unpack
from pipelines.runs.run import Run


def test_any_batches_give_the_same_tallies(scored) -> None:
    run, data, rows = scored
    examples = read_dataset(str(data), Storage())
    columns = ("uri", "category", "score", "anomaly_map", "map_height", "map_width", "height", "width")

    def tallied(sizes: list[int]) -> dict[str, dict[str, float]]:
        total: dict[str, Tally] = {}
        start = 0
        for size in sizes:
            part = rows[start : start + size]
            batch = {name: np.array([row[name] for row in part]) for name in columns}
            (packed,) = count_batch(batch, Run.at(str(run)), examples)["tallies"]
            for name, tally in unpack(packed).items():
                total[name] = total.get(name, Tally()).merge(tally)
            start += size
        return {name: tally.metrics() for name, tally in total.items()}

    assert tallied([18]) == tallied([9, 9]) == tallied([1, 2, 3, 4, 5, 2, 1])


def test_a_missing_mask_is_counted_and_left_out(scored) -> None:
    run, data, rows = scored
    (data / "bottle/ground_truth/good").mkdir()
    (data / "bottle/ground_truth/cut/000_mask.png").rename(data / "bottle/ground_truth/good/000_mask.png")
    columns = ("uri", "category", "score", "anomaly_map", "map_height", "map_width", "height", "width")
    batch = {name: np.array([row[name] for row in rows]) for name in columns}
    examples = read_dataset(str(data), Storage())
    (packed,) = count_batch(batch, Run.at(str(run)), examples)["tallies"]
    bottle = unpack(packed)["bottle"]
    assert bottle.without_mask == 1
    assert bottle.doubts == {"of images that count as good: left out": 1}
    assert len(bottle.images) == 9
    assert bottle.pixels.normal.sum() + bottle.pixels.anomalous.sum() == 8 * 32 * 32


def test_a_result_matches_its_image_wherever_the_archive_was(scored) -> None:
    _, data, _ = scored
    by_path = {example.path: example for example in read_dataset(str(data), Storage())}
    for uri in ("s3://bucket/copy/cable/test/cut/001.png", "/elsewhere/cable/test/cut/001.png"):
        assert find_example(uri, by_path).path == "cable/test/cut/001.png"
    with pytest.raises(GladError, match="not in the dataset"):
        find_example("/elsewhere/screw/test/cut/001.png", by_path)
    with pytest.raises(GladError, match="no truth about further pages; score it with --pages first"):
        find_example("/elsewhere/cable/test/cut/001.png#page=2", by_path)
