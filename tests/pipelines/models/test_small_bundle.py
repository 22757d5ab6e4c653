"""The bundle that ships with the project."""

import math

from safetensors import safe_open

from glad_core.bundle.glad_json import verify
from glad_core.bundle.model import load_bundle
from glad_core.judge import detect
from glad_core.verdict import Request
from pipelines.demo.boards import DEFECTS
from pipelines.models.find import SMALL_BUNDLE
from pipelines.small_model.pictures import board_picture


def test_it_is_small_and_whole():
    description = verify(SMALL_BUNDLE)
    weights = [name for name in description.files if name.endswith(".safetensors")]
    assert sum(description.files[name].size for name in weights) <= 20_000_000
    parameters = 0
    for name in weights:
        with safe_open(SMALL_BUNDLE / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                shape = tensors.get_slice(key).get_shape()
                parameters += math.prod(shape)
    assert parameters <= 9_000_000


def test_it_finds_every_kind_of_defect():
    model = load_bundle(SMALL_BUNDLE)
    requests = [Request(split, board_picture(0, seed=77, split=split)) for split in ("good", *DEFECTS)]
    scores = {result.image_id: result.score for result in detect(model, requests)}
    assert all(scores[defect] > scores["good"] for defect in DEFECTS), scores
