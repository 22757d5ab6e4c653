from types import SimpleNamespace

import pytest

from glad_core.errors import GladError
from pipelines.score import open_run
from pipelines.score.request import ScoreRequest


def test_a_category_that_no_model_knows_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    models = SimpleNamespace(categories=("a, b", "nut"), settings=dict, bundles={}, descriptions={})
    monkeypatch.setattr(open_run, "find_models", lambda *_: models)
    monkeypatch.setattr(open_run, "identity", lambda *_: {})
    request = {"source": str(tmp_path), "model": "models", "out": "/nowhere/run"}
    with pytest.raises(GladError, match="models has no category 'nutt'; did you mean 'nut'"):
        open_run.check(ScoreRequest(**request, category="nutt"))
    assert open_run.check(ScoreRequest(**request, category="a, b")).request.category == "a, b"
