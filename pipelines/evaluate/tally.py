"""From results to counts: Ray Data tasks compare results with the ground truth, and their counts add up exactly.

The counts of pixels are `glad_core.pixel_metrics`; the metrics of all tasks together are those of a single one.
"""

from __future__ import annotations

import pickle
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from cluster import session
from cluster.storage import StorageError
from glad_core.decoding.picture import ImageError
from glad_core.errors import GladError
from glad_core.image_metrics import auroc_interval, image_metrics
from glad_core.pixel_metrics import PixelCounts
from pipelines.archive.examples import Example
from pipelines.archive.uris import path_of
from pipelines.evaluate.masks import marks, read_mask, resize_mask
from pipelines.runs.run import Run
from pipelines.runs.schema import ERRORS, RESULTS

TASK_CPUS = 0.5
BATCH = 64  # results counted in one call
PATH_PARTS = 8  # of a result's URI, from its end, that may name an image of the dataset


@dataclass
class Tally:
    """The counts of one category: pixels, image scores and labels; anomalous images without a mask, and undecided ones.

    ``undecided`` results have a score or map that is not finite; runs of older versions may hold some.
    """

    pixels: PixelCounts = field(default_factory=PixelCounts)
    images: list[tuple[str, float, bool]] = field(default_factory=list)  # URI, score, anomalous
    without_mask: int = 0
    undecided: int = 0
    doubts: Counter[str] = field(default_factory=Counter)  # about masks that count all the same, in words

    def merge(self, other: Tally) -> Tally:
        """Both tallies' counts together."""
        return Tally(
            self.pixels.merge(other.pixels),
            [*self.images, *other.images],
            self.without_mask + other.without_mask,
            self.undecided + other.undecided,
            self.doubts + other.doubts,
        )

    def metrics(self, pro_limit: float = 0.3, pro_thresholds: int | None = None) -> dict[str, float]:
        """All columns, 0 to 1, and the ends of the 95 % bootstrap interval of the image AUROC; NaN if undefined.

        Args:
            pro_limit: largest false-positive rate of PRO.
            pro_thresholds: count PRO at this many even thresholds instead of at all.
        """
        images = sorted(self.images)  # independent of the order of the tasks
        scores = np.array([score for _, score, _ in images])
        labels = np.array([label for _, _, label in images])
        image = dict.fromkeys(("AUROC", "AP", "F1max"), float("nan"))
        low = high = float("nan")
        if labels.any() and not labels.all():
            image = image_metrics(scores, labels)
            low, high = auroc_interval(scores, labels)
        pixel = self.pixels.metrics(pro_limit)
        if pro_thresholds is not None:
            pixel["PRO"] = self.pixels.pro_200(pro_limit, pro_thresholds)
        return {
            "I-AUROC": image["AUROC"],
            "I-AP": image["AP"],
            "I-F1-max": image["F1max"],
            "P-AUROC": pixel["P-AUROC"],
            "P-AP": pixel["P-AP"],
            "P-F1-max": pixel["P-F1max"],
            "PRO": pixel["PRO"],
            "AUPIMO": pixel["AUPIMO"],
            "I-AUROC low": low,
            "I-AUROC high": high,
        }


def tally_results(run: Run, examples: list[Example]) -> dict[str, Tally]:
    """The tallies of a finished run's results by category, counted by Ray Data tasks.

    Raises:
        GladError: no finished run, no results, or results of images that are not in the dataset.
        StorageError: storage does not answer.
    """
    import ray.data

    _ = run.record  # read once; tasks get it with the run
    filesystem, path = run.storage.resolve(run.path(RESULTS))
    columns = ["uri", "category", "score", "anomaly_map"]
    columns += ["map_height", "map_width", "full_height", "full_width", "height", "width"]
    rows = ray.data.read_parquet(path, filesystem=filesystem, columns=columns, num_cpus=TASK_CPUS)
    counted = rows.map_batches(
        count_batch,  # type: ignore[arg-type]
        fn_kwargs={"run": run, "examples": examples},
        batch_size=BATCH,
        batch_format="numpy",
        num_cpus=TASK_CPUS,
    )
    tallies: dict[str, Tally] = {}
    try:
        for row in counted.iter_rows():
            for name, tally in unpack(row["tallies"]).items():
                tallies[name] = tallies[name].merge(tally) if name in tallies else tally
    except Exception as error:
        raise session.root_cause(error, GladError, StorageError) from None
    if not tallies:
        raise GladError(f"{run.location}: the run judged no image; see {run.path(ERRORS)}")
    return tallies


def count_batch(batch: dict[str, np.ndarray], run: Run, examples: list[Example]) -> dict[str, list[bytes]]:
    """A stage: results in, one row with their tallies by category out (`unpack`)."""
    import torch

    torch.set_num_threads(1)
    by_path = _by_path(tuple(examples))
    tallies: dict[str, Tally] = {}
    for index in range(len(batch["uri"])):
        row = {name: column[index] for name, column in batch.items()}
        example = find_example(str(row["uri"]), by_path)
        tally = tallies.setdefault(example.category, Tally())
        anomaly_map = run.full_map(row).astype(np.float16)
        if not (np.isfinite(row["score"]) and np.isfinite(anomaly_map).all()):
            tally.undecided += 1
            continue
        tally.images.append((str(row["uri"]), float(row["score"]), example.anomalous))
        _count_pixels(tally, example, anomaly_map, (row["height"], row["width"]), run, examples)
    return {"tallies": [zlib.compress(pickle.dumps(tallies), 1)]}


def unpack(tallies: bytes) -> dict[str, Tally]:
    """The tallies by category of one `count_batch` call."""
    return pickle.loads(zlib.decompress(tallies))


def _count_pixels(
    tally: Tally, example: Example, anomaly_map: np.ndarray, size: tuple[int, int], run: Run, examples: list[Example]
) -> None:
    if not example.anomalous:
        if any(marks(uri, run.storage, examples) for uri in example.masks):
            tally.doubts["of images that count as good: left out"] += 1
        tally.pixels.add(anomaly_map, None)
        return
    try:
        mask = read_mask(example, run.storage, examples) if example.masks else None
    except ImageError:
        mask = None
    if mask is None:
        tally.without_mask += 1
        return
    tally.doubts.update(re.sub(r"^\d+% of it is", "more than half is", doubt) for doubt in mask.doubts)
    if mask.marked.shape != size:
        tally.doubts["another size than its image: stretched"] += 1
    tally.pixels.add(anomaly_map, resize_mask(mask.marked, anomaly_map.shape))


@cache
def _by_path(examples: tuple[Example, ...]) -> dict[str, Example]:
    return {example.path: example for example in examples}


def find_example(uri: str, by_path: dict[str, Example]) -> Example:
    """The image of the dataset that a result is about: the one whose path ends the result's URI.

    Raises:
        GladError: there is none.
    """
    parts = path_of(uri).split("/")
    for start in range(max(0, len(parts) - PATH_PARTS), len(parts)):
        example = by_path.get("/".join(parts[start:]))
        if example is not None:
            return example
    if "#page=" in uri:
        raise GladError(f"{uri}: a dataset has no truth about further pages; score it with --pages first")
    raise GladError(f"{uri}: a scored image that is not in the dataset; name the dataset that was scored")
