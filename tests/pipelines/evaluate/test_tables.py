import io
import json
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from sklearn import metrics as sk
from typer.testing import CliRunner

from pipelines.cli.main import app
from pipelines.evaluate import tables

FULL = dict.fromkeys((*tables.COLUMNS, "I-AUROC low", "I-AUROC high"), 1.0)


@pytest.mark.parametrize("name", ["circuit_board", "x" * 18, "x" * 45, "[red]", "[/end]", "電路板" * 3])
def test_names_and_numbers_are_whole_at_80_columns(name) -> None:
    shown = io.StringIO()
    tables.print_whole(tables._table({name: FULL, "average": FULL}), Console(file=shown, width=80))
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    (row,) = (line for line in lines if line.startswith(name))
    assert row.split() == [name, "100.0", "100.0-100.0", *["100.0"] * 7]
    assert len(lines) == 9, "a row has one line"
    assert max(map(cell_len, shown.getvalue().splitlines())) <= 80 or len(name) == 45


@pytest.mark.slow
def test_the_table_agrees_with_scikit_learn(scored, tmp_path, ray_session) -> None:
    run, data, rows = scored
    extra = data / "cable/test/good/099.png"
    extra.write_bytes((data / "cable/test/good/000.png").read_bytes())  # never scored
    outcome = CliRunner().invoke(app, ["evaluate", str(run), "--dataset", str(data), "--out", str(tmp_path / "tables")])
    assert outcome.exit_code == 0, outcome.output
    ours = json.loads((tmp_path / "tables/metrics.json").read_text())["ours"]
    assert list(ours) == ["bottle", "cable", "average"]
    for category in ("bottle", "cable"):
        members = [row for row in rows if row["category"] == category]
        labels = ["/cut/" in row["uri"] for row in members]
        scores = [np.float32(row["score"]) for row in members]
        maps = np.concatenate([row["anomaly_map"] for row in members]).astype(np.float64)
        masks = np.concatenate([row["mask"].ravel() for row in members])
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
    assert re.search(r"PatchCore\W+99.1\W+99.6\W+98.1\W", outcome.stdout)
    assert (tmp_path / "tables/metrics.csv").read_text().startswith("category,I-AUROC,I-AP,I-F1-max,P-AUROC")
    assert (tmp_path / "tables/metrics.md").read_text().count("\n") == 5
