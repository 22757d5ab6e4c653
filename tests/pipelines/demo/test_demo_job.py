import io
import json

import pytest
from rich.console import Console

from pipelines.demo import job
from pipelines.demo.boards import make_demo_data


@pytest.mark.slow
def test_a_small_demo_leaves_results_a_sheet_a_page_and_metrics(tmp_path, monkeypatch, ray_session) -> None:
    monkeypatch.setattr(job, "make_demo_data", lambda out: make_demo_data(out, 0, 1, 3, 1))
    lines = io.StringIO()
    job.demo(tmp_path, Console(file=lines, width=200))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["images"], metrics["errors"]) == (7, 0)  # test images only
    assert metrics["i_auroc"] > 0.9
    assert metrics["p_auroc"] > 0.9
    assert (tmp_path / "run/run.json").exists()
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert "7</b><span>images" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.html").as_uri() in lines.getvalue()
    assert "of 7 boards called anomalous" in lines.getvalue()
