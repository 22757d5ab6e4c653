from dataclasses import replace

import numpy as np
import pytest
import torch

from glad_core.bundle.model import load_bundle
from glad_core.errors import GladError
from glad_core.verdict import Detection, NotFinite, Request, check_request, finite


@pytest.mark.parametrize(
    "image", [np.zeros((32, 31, 3), np.uint8), np.zeros((32, 32), np.uint8), np.zeros((32, 32, 3), np.float32)]
)
def test_an_image_of_another_size_or_type_is_refused(tiny_bundle, image: np.ndarray) -> None:
    model = load_bundle(tiny_bundle)
    check_request(model, Request("good", np.zeros((32, 32, 3), np.uint8)))
    with pytest.raises(GladError, match=r"^bad: expected uint8 32x32x3, got .*resize it"):
        check_request(model, Request("bad", image))


def test_a_category_that_the_bundle_does_not_have_is_refused(tiny_bundle) -> None:
    model = replace(load_bundle(tiny_bundle), prompts={"nut": torch.zeros(1, 4, 16)})
    image = np.zeros((32, 32, 3), np.uint8)
    check_request(model, Request("a", image, "nut"))
    for category in ("bolt", None):
        with pytest.raises(GladError, match=r"categor.*nut"):
            check_request(model, Request("a", image, category))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_verdict_is_finite_or_none(value: float) -> None:
    fine = np.zeros((2, 2), np.float16)
    whole = Detection("a", 1.0, 350, "difference", [(350, 0.5)], fine, np.zeros((2, 2, 3), np.uint8), 0.1, [value])
    assert finite(whole) is whole  # departures only guide the search
    holed = fine.copy()
    holed[1, 1] = value
    for change, words in (
        ({"score": value}, "its score"),
        ({"anomaly_map": holed}, "its anomaly map"),
        ({"steps": [(450, 0.1), (350, value)]}, "a step score"),
    ):
        verdict = finite(replace(whole, **change))
        assert isinstance(verdict, NotFinite)
        assert words in str(verdict)
