"""Every export of `glad export` is read with its consumer's own library and holds what the run holds."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from judged_run import make_judged_run
from PIL import Image
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.export.images import Judged
from pipelines.export.label_studio import _share
from pipelines.runs import feedback
from pipelines.runs.run import Run


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_bundle):
    return make_judged_run(tmp_path_factory.mktemp("export"), tiny_bundle)


def glad(*words):
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    return outcome.exit_code, outcome.stdout, outcome.stderr


def exported(judged, out, *words):
    code, text, errors = glad("export", judged.run.location, "--out", out, "--json", *words)
    assert code == 0, errors
    return json.loads(text)


def alarms(judged, category=None):
    return [row for row in judged.rows if row["is_anomalous"] and category in (None, row["category"])]


def test_the_table_for_spreadsheets(judged, tmp_path) -> None:
    done = exported(judged, tmp_path, "--csv")
    table = pd.read_csv(tmp_path / "verdicts.csv")
    assert (tmp_path / "verdicts.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "else Excel takes it for Latin-1"
    assert len(table) == done["images"] == len(judged.rows)
    assert (table.verdict == "anomalous").sum() == done["alarms"] == len(alarms(judged))
    assert list(table["score / threshold"]) == sorted(table["score / threshold"], reverse=True)
    scores = {row["image_id"]: np.float32(row["score"]) for row in judged.rows}
    read = pd.read_csv(tmp_path / "verdicts.csv", dtype={"image_id": str})
    assert read.set_index("image_id").score.to_dict() == pytest.approx(scores)
    assert table.groupby("category")["p-value"].apply(set).to_dict()["bottle"] == {0.5}
    assert table["p-value"].isna().sum() == (table.category == "cable").sum() > 0
    assert set(table.uri) == {row["uri"] for row in judged.rows}


def test_a_score_is_a_share_of_twice_its_threshold_unless_that_means_nothing() -> None:
    for threshold, standardised, expected in (
        (2.0, False, 0.6),
        (2.0, True, None),
        (0.0, False, None),
        (-1, True, None),
    ):
        assert _share(SimpleNamespace(threshold=threshold, is_standardised=standardised), 3.0) == expected


def test_which_results_are_standardised(judged) -> None:
    models = {"bottle": {"settings": {"views": [{}, {}]}}, "cable": {"settings": {"views": [{}]}}}
    run = Run(judged.run.location)
    run.__dict__["record"] = {"models": models}
    assert [Judged(run, {"category": name}).is_standardised for name in ("bottle", "cable", None)] == [
        True,
        False,
        False,
    ]
    assert run.standardised == {"bottle"}


@pytest.mark.parametrize(
    ("words", "matches"),
    [
        (("--verdict", "anomalous"), lambda row: row["is_anomalous"]),
        (
            ("--category", "cable", "--verdict", "good"),
            lambda row: row["category"] == "cable" and not row["is_anomalous"],
        ),
        (("--text", "CUT/01"), lambda row: "cut/01" in row["uri"]),
        (("--reason", "min_step"), lambda row: row["stop_reason"] == "min_step"),
        (("--low", "0.5", "--high", "1.1"), lambda row: 0.5 <= row["score"] <= 1.1),
    ],
)
def test_filters_are_those_of_the_view(judged, tmp_path, words, matches) -> None:
    done = exported(judged, tmp_path, "--csv", "--coco", *words)
    wanted = {row["uri"] for row in judged.rows if matches(row)}
    assert 0 < len(wanted) == done["images"] < len(judged.rows)
    assert set(pd.read_csv(tmp_path / "verdicts.csv").uri) == wanted
    assert {image["coco_url"] for image in json.loads((tmp_path / "coco.json").read_text())["images"]} == wanted


def test_coco_is_read_by_pycocotools(judged, tmp_path, capsys) -> None:
    coco_tools = pytest.importorskip("pycocotools.coco", reason="the extra `export` is not installed")
    done = exported(judged, tmp_path, "--coco")
    coco = coco_tools.COCO(tmp_path / "coco.json")
    assert len(coco.imgs) == len(judged.rows)
    assert {category["name"] for category in coco.cats.values()} == {"bottle", "cable"}
    cut = {row["uri"] for row in judged.rows if row["is_anomalous"] and row["anomaly_map"].max() > row["threshold"]}
    assert {coco.imgs[found["image_id"]]["coco_url"] for found in coco.anns.values()} == cut
    assert done["left_out"] == {"alarms without a region above the threshold": len(alarms(judged)) - len(cut)}
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        assert (image["width"], image["height"]) == (60, 40)
        mask = coco.annToMask(annotation)
        assert mask.shape == (40, 60)
        assert mask.sum() == annotation["area"]
        # The cut is drawn at rows 8 to 19 and columns 10 to 23 of a map of 32 x 32.
        rows, columns = np.nonzero(mask)
        assert np.abs(np.array([rows.min(), rows.max() + 1]) - np.array([8, 20]) * 40 / 32).max() <= 1.5
        assert np.abs(np.array([columns.min(), columns.max() + 1]) - np.array([10, 24]) * 60 / 32).max() <= 2
        assert annotation["score"] > 0.5


def test_masks_show_what_coco_outlines(judged, tmp_path) -> None:
    exported(judged, tmp_path, "--masks", "--text", "cut/002")
    masks, heat = sorted((tmp_path / "masks").iterdir()), sorted((tmp_path / "heat").iterdir())
    assert [file.name for file in masks] == [file.name for file in heat]
    assert len(masks) == 2
    mask = np.asarray(Image.open(masks[0]))
    assert mask.shape == (40, 60)
    assert set(np.unique(mask)) == {0, 255}
    assert mask[11:24, 20:44].all()
    assert not mask[:8].any()
    assert np.asarray(Image.open(heat[0])).shape == (40, 60, 3)
    code, _, error = glad("export", judged.run.location, "--masks", "--out", tmp_path)
    assert code == 2
    assert "holds masks of an earlier export" in error


def test_the_delta_table_is_the_runs_own_files(judged, tmp_path) -> None:
    deltalake = pytest.importorskip("deltalake", reason="the extra `export` is not installed")
    before = {file: file.stat() for file in (tmp_path / judged.run.location).rglob("*.parquet")}
    table = exported(judged, tmp_path, "--delta")["files"]["delta"]
    assert {file: file.stat() for file in (tmp_path / judged.run.location).rglob("*.parquet")} == before
    read = deltalake.DeltaTable(table).to_pandas()
    assert read.is_anomalous.sum() == len(alarms(judged))
    assert set(read.image_id) == {row["image_id"] for row in judged.rows}
    exported(judged, tmp_path, "--delta")
    assert deltalake.DeltaTable(table).version() == 0, "nothing has changed since"
    log = Path(table) / "_delta_log/00000000000000000000.json"
    ours = next(Path(table).rglob("part-*.parquet")).name
    log.write_text(log.read_text().replace(ours, "part-of-the-run-before.parquet"))
    exported(judged, tmp_path, "--delta")
    assert deltalake.DeltaTable(table).version() == 1, "as after --overwrite"
    assert len(deltalake.DeltaTable(table).to_pandas()) == len(judged.rows)
    assert len(pq.read_table(table)) == len(judged.run.results().to_table()) == len(judged.rows)


def test_the_iceberg_table_is_the_runs_own_files(judged, tmp_path) -> None:
    table = pytest.importorskip("pyiceberg.table", reason="the extra `export` is not installed")
    metadata = exported(judged, tmp_path, "--iceberg")["files"]["iceberg"]
    scan = table.StaticTable.from_metadata(metadata).scan(row_filter="is_anomalous = true")
    assert set(scan.to_pandas().image_id) == {row["image_id"] for row in alarms(judged)}
    assert list(tmp_path.rglob("*.parquet")) == []


def test_marks_of_label_studio_come_back(judged, tmp_path) -> None:
    exported(judged, tmp_path, "--label-studio", "--verdict", "anomalous")
    tasks = json.loads((tmp_path / "label-studio.json").read_text())
    assert len(tasks) == len(alarms(judged))
    for task in tasks:
        assert 0.5 < task["predictions"][0]["score"] < 1, "Label Studio takes no other"
        for found in task["predictions"][0]["result"]:
            points = np.array(found["value"]["points"])
            assert ((points >= 0) & (points <= 100)).all()
            assert (found["original_width"], found["original_height"]) == (60, 40)

    def annotation(choice, when):
        result = [{"type": "choices", "from_name": "verdict", "to_name": "image", "value": {"choices": [choice]}}]
        return {"result": result, "was_cancelled": False, "updated_at": when}

    tasks[0]["annotations"] = [annotation("false alarm", "2026-01-02T00:00:00Z"), annotation("confirmed", "2026-01-01")]
    tasks[1]["annotations"] = [annotation("confirmed", "2026-01-01")]
    tasks[2]["annotations"] = [{"result": [], "was_cancelled": True}]
    tasks[3]["annotations"] = [{"result": tasks[3]["predictions"][0]["result"]}]
    tasks[4]["annotations"] = []
    tasks[5] = {"data": {"image": "elsewhere.png"}, "annotations": [annotation("confirmed", "2026")]}
    tasks[6]["data"]["image_id"] = "of another run"
    tasks[6]["annotations"] = [annotation("confirmed", "2026")]
    (tmp_path / "project.json").write_text(json.dumps(tasks[:7]))
    code, text, errors = glad("feedback", judged.run.location, "--label-studio", tmp_path / "project.json", "--json")
    assert code == 0, errors
    marks = {mark["image_id"]: mark["verdict"] for mark in feedback.read_marks(judged.run)}
    assert marks == {tasks[0]["data"]["image_id"]: "false_alarm", tasks[1]["data"]["image_id"]: "confirmed"}
    done = json.loads(text)
    assert done["kept"] == 2
    assert list(done["left_out"].values()) == [1] * 6
    minimal = [{"image": "x", "image_id": tasks[0]["data"]["image_id"], "verdict": "confirmed", "updated_at": "2027"}]
    (tmp_path / "min.json").write_text(json.dumps(minimal))
    assert glad("feedback", judged.run.location, "--label-studio", tmp_path / "min.json")[0] == 0
    exported(judged, tmp_path, "--csv", "--mark", "confirmed")
    assert len(pd.read_csv(tmp_path / "verdicts.csv")) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "say what to export"),
        (("--csv", "--category", "cabel"), "no image matches the filter; its categories: bottle, cable"),
        (("--delta", "--iceberg", "--low", "1"), "--delta and --iceberg registers whole files"),
    ],
)
def test_mistakes_are_one_line(judged, tmp_path, words, message) -> None:
    code, _, errors = glad("export", judged.run.location, "--out", tmp_path, *words)
    assert (code, errors.count("\n")) == (2, 1)
    assert message in errors


@pytest.mark.parametrize(
    "task",
    [
        {"data": {"image_id": "\ud800"}, "annotations": []},
        {"data": 1, "annotations": None},
        {"data": {"image_id": "x"}, "annotations": {"a": 1}},
        {"data": {"image_id": "x"}, "annotations": [1]},
        {"data": {"image_id": "x"}, "annotations": [{"result": [1, {"type": "choices", "value": 3}]}]},
        {"data": {"image_id": "x"}, "annotations": [{"result": [{"type": "choices", "value": {"choices": 7}}]}]},
        {"image_id": "x", "verdict": {"choices": [["confirmed"]]}},
        {"image_id": "x", "verdict": ["confirmed", "false alarm"]},
        {"image_id": "x"},
    ],
)
def test_what_is_no_mark_is_counted(judged, tmp_path, task) -> None:
    (tmp_path / "x.json").write_text(json.dumps([task]))
    code, text, errors = glad("feedback", judged.run.location, "--label-studio", tmp_path / "x.json", "--json")
    assert code == 0, errors
    assert json.loads(text)["kept"] == 0
    assert sum(json.loads(text)["left_out"].values()) == 1


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\x00", "[" * 100_000])
def test_what_label_studio_did_not_write_is_refused(judged, tmp_path, content) -> None:
    (tmp_path / "x.json").write_text(content)
    code, _, errors = glad("feedback", judged.run.location, "--label-studio", tmp_path / "x.json")
    assert code == 2
    assert "no export of Label Studio" in errors


def test_the_page_about_exports_does_what_it_says(judged, tmp_path, monkeypatch) -> None:
    pytest.importorskip("deltalake", reason="the extra `export` is not installed")
    page = (Path(__file__).parents[3] / "docs/exports.md").read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "monday").symlink_to(judged.run.location)
    monkeypatch.chdir(tmp_path)
    names: list[dict] = []
    for kind, text in blocks:
        if kind == "sh":
            for line in text.splitlines():
                code, _, errors = glad(*shlex.split(line)[1:])
                assert code == 0, errors
        else:
            names.append({})
            exec(compile(text, "docs/exports.md", "exec"), names[-1])
    table, coco, delta, iceberg = names
    assert table["by_category"].sum() == len(judged.rows)
    assert coco["mask"].sum() == coco["largest"]["area"] > 0
    assert len(delta["anomalies"]) == len(iceberg["anomalies"]) == len(alarms(judged))
