from dataclasses import replace

import numpy as np
import pytest

from glad_core import model_comparison
from glad_core.bundle.model import load_bundle


@pytest.mark.parametrize(("skill", "passed"), [(3.0, True), (1.0, True), (0.0, False)])
def test_the_gate_lets_through_what_detects_no_worse(tiny_bundle, monkeypatch, skill: float, passed: bool) -> None:
    """Scores are drawn, not computed: anomalies lie ``skill`` (the old model: 1) standard deviations higher."""
    old = load_bundle(tiny_bundle)
    new = replace(old, settings=old.settings.model_copy(update={"image_score_top_k": 1}))

    def judged(model, pictures, *rest):
        rng = np.random.default_rng(0)
        shift = np.repeat([0.0, skill if model is new else 1.0], len(pictures) // 2)
        return (rng.normal(size=len(pictures)) + shift)[:, None]

    monkeypatch.setattr(model_comparison, "score_pictures", judged)
    good = [np.zeros((32, 32, 3), np.uint8)] * 60
    comparison = model_comparison.compare_models(new, old, good, 3, margin=0.02)
    assert comparison.passed is passed
    assert (comparison.new > comparison.old) is (skill > 1)
    assert comparison.low <= comparison.new - comparison.old
