import io
from datetime import UTC, datetime
from types import SimpleNamespace

import pyarrow as pa
import pytest
from judged_run import finish_run, make_judged_run
from rich.console import Console

from cluster.storage import Storage
from glad_core.bundle.settings import Settings
from pipelines.runs.run import Run
from pipelines.runs.schema import SCORED_SCHEMA
from pipelines.score import record
from pipelines.score.actor_plan import ActorPlan
from pipelines.score.record import methods, print_end, run_record, without_reconstructions
from pipelines.score.request import Counts, ScoreRequest


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_bundle):
    return make_judged_run(tmp_path_factory.mktemp("judged run"), tiny_bundle)


def ending(judged, scored=60, anomalies=24):
    shown = io.StringIO()
    print_end(judged.run.location, Counts(scored + 1, scored, anomalies, 1, 0), Console(file=shown, width=40))
    return shown.getvalue().splitlines()


def test_results_that_cannot_be_read_again_do_not_fail_the_run(judged, monkeypatch):
    def gone(run):
        raise OSError("When reading information for key: curlCode: 8, Weird server reply")

    monkeypatch.setattr(Run, "errors", gone)
    lines = ending(judged)
    assert lines[0].startswith("the results cannot be read just now: ")
    assert lines[1:] == [f"next: glad report '{judged.run.location}'"]


def test_a_run_ends_with_its_errors_its_worst_images_and_what_comes_next(judged):
    lines = ending(judged)
    assert lines[0].startswith("errors by kind: 1 damaged; ")
    assert lines[1] == "most anomalous, by score:"
    margin = {row["uri"]: row["score"] / row["threshold"] for row in judged.rows}
    worst = sorted(margin, key=lambda uri: -margin[uri])[:5]
    assert [line.split("  ")[-1] for line in lines[2:7]] == worst
    assert all("  anomalous  " in line for line in lines[2:7])
    assert lines[7:] == [f"next: glad report '{judged.run.location}'"]  # a blank is in it


@pytest.mark.parametrize(
    ("calibration", "good", "anomalies", "said"),
    [
        ({"target_fpr": 0.05}, None, 12, "12 of 60 images are anomalous; of good ones the threshold allows 5.0%: "),
        ({"target_fpr": 0.05}, None, 8, None),  # may be chance
        ({"target_fpr": 0.1}, None, 12, None),
        (None, "photos/good", 12, "12 of 60 images are anomalous; of good ones the threshold allows 5.0%: "),
        (None, None, 60, None),  # nothing is known of the threshold
        ({"target_fpr": 0.05}, None, None, None),  # there is none
    ],
)
def test_far_more_anomalies_than_the_threshold_allows_are_said(calibration, good, anomalies, said):
    models = {"": {"calibration": calibration}}
    run = SimpleNamespace(record={"models": models, "request": {"good": good}})
    found = record._unlike_training(run, Counts(60, 60, anomalies, 0, 0))
    assert len(found) == (said is not None)
    assert all(line.startswith(said) for line in found)


@pytest.mark.parametrize(
    ("bundles", "good", "judged_by", "line"),
    [
        (["glad"], None, "glad", None),
        (["nearest"], "good", "nearest", "keeps none: good patches"),
        (["nearest"], None, "nearest", "keeps none: good patches"),
        (["glad", "nearest"], None, "glad, nearest", "keeps none of 1: good patches"),
    ],
)
def test_what_judged_is_recorded(tmp_path, bundles, good, judged_by, line):
    settings = {str(key): Settings(method=method) for key, method in enumerate(bundles)}
    facts = {"target_fpr": 0.1, "calibration_images": 9}
    described = {key: SimpleNamespace(model_id=key, category="c", settings={}, provenance=facts) for key in settings}
    models = SimpleNamespace(settings=lambda: settings, descriptions=described)
    request = ScoreRequest("photos", "run", "model", method="nearest" if good else "glad", good=good)
    known = {"source": "photos", "search": dict.fromkeys(settings, "scan")}
    actors, counts, run = ActorPlan(1, 1, 0, 1, 1, 1), Counts(1, 1, 0, 0, 0), Run(str(tmp_path), Storage())
    record = run_record(request, known, run, models, actors, counts, datetime.now(UTC), 1.0)
    assert record["method"] == judged_by
    assert [model["method"] for model in record["models"].values()] == judged_by.split(", ")
    assert [model["search"] is None for model in record["models"].values()] == [
        model["method"] == "nearest" for model in record["models"].values()
    ]
    assert [model["calibration"] is None for model in record["models"].values()] == [good is not None] * len(bundles)
    said = without_reconstructions(methods(models))
    assert said is None if line is None else line in said


def test_a_huge_run_is_not_read_again(judged):
    assert ending(judged, scored=2_000_000) == [f"next: glad report '{judged.run.location}'"]


def test_a_single_picture_ends_with_its_verdict(tmp_path):
    row = {"image_id": "a", "uri": "/one.png", "category": "c", "score": 2.5, "threshold": 1.25, "is_anomalous": True}
    run = Run(str(tmp_path / "run"), Storage())
    record = {"counts": {"scored": 1, "errors": 0}}
    manifest = pa.Table.from_pylist([{"image_id": "a", "uri": "/one.png"}])
    finish_run(run, pa.Table.from_pylist([row | {"position": 0}], schema=SCORED_SCHEMA), manifest, record)
    shown = io.StringIO()
    print_end(run.location, Counts(1, 1, 1, 0, 0), Console(file=shown))
    assert shown.getvalue().splitlines()[0] == "verdict:  2.5  anomalous  /one.png  (threshold 1.25)"
