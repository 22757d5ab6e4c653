"""The engine on an NVIDIA GPU, with real weights; everything else in this folder runs on a CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from glad_core.bundle.model import load_bundle
from glad_core.engine.base import run
from glad_core.engine.engine import Engine
from glad_core.engine.networks import keep_norms_low
from glad_core.engine.process import set_up
from glad_core.images import resize
from glad_core.judge import detect
from glad_core.verdict import Detection, Request
from pipelines.demo.boards import DEFECTS, board_rng, make_board
from pipelines.models.find import SMALL_BUNDLE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def model():
    set_up(gpu=True, threads=1)
    return load_bundle(SMALL_BUNDLE, "cuda")


@pytest.fixture(scope="module")
def requests(model):
    kinds = [None, *DEFECTS, None]
    boards = [make_board(board_rng(3, kind or "good", index), kind)[0] for index, kind in enumerate(kinds)]
    return [Request(str(index), resize(board, model.settings.resolution)) for index, board in enumerate(boards)]


@pytest.fixture(scope="module")
def references(model, requests):
    """What the reference loop says on the GPU, each image judged alone."""
    return {request.image_id: next(iter(detect(model, [request]))) for request in requests}


def assert_agrees(found, expected, delta, score=1e-3):
    assert isinstance(found, Detection), found
    if not any(abs(value - delta) < 1e-3 * delta for _, value in expected.steps):  # else rounding decides
        assert (found.stop_step, found.stop_reason) == (expected.stop_step, expected.stop_reason)
        assert found.score == pytest.approx(expected.score, abs=score, rel=score)


@pytest.mark.parametrize("search", ["scan", "guarded"])
@pytest.mark.parametrize("slots", [1, 4])
def test_same_answers_as_the_reference(model, requests, references, search, slots):
    found = dict(run(Engine(model, slots, search=search), requests))
    for request in requests:
        assert_agrees(found[request], references[request.image_id], model.settings.delta)
    assert len({detection.stop_step for detection in references.values()}) > 1


def test_same_answers_as_a_cpu(model, requests, references):
    cpu = load_bundle(SMALL_BUNDLE)
    for request, expected in zip(requests, detect(cpu, requests), strict=True):
        assert_agrees(references[request.image_id], expected, model.settings.delta, score=1e-2)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_lower_precision_is_near(model, requests, autocast):
    near = replace(model, autocast=autocast, settings=model.settings.model_copy(update={"delta": 0.0}))
    full = replace(near, autocast=None)
    expected = dict(run(Engine(full, 4, search="scan"), requests))
    for request, found in run(Engine(near, 4, search="scan"), requests):
        assert found.score == pytest.approx(expected[request].score, rel=0.1)
        assert np.isfinite(found.anomaly_map).all()


def test_norms_keep_the_precision_of_autocast():
    norm = torch.nn.GroupNorm(2, 6).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        x = torch.randn(3, 6, 5, 7, device="cuda", dtype=torch.bfloat16)
        in_float32 = norm(x)
        keep_norms_low(norm)
        found = norm(x)
    assert (in_float32.dtype, found.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found.float(), in_float32, atol=0.02, rtol=0.01)


def test_compiled_networks_give_the_same_and_never_compile_in_flight(requests, references):
    model = load_bundle(SMALL_BUNDLE, "cuda")
    engine = Engine(model, 2, compiled=True)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    found = dict(run(engine, requests))
    for request in requests:
        assert_agrees(found[request], references[request.image_id], model.settings.delta, score=1e-2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_too_many_slots_for_the_memory_become_fewer_and_nothing_is_lost(model, requests):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    list(run(Engine(model, 1), requests[:1]))
    one = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    many = [replace(request, image_id=f"{request.image_id}/{n}") for request in requests for n in range(6)]
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 4 * one) / total)
        engine = Engine(model, len(many))
        found = list(run(engine, many))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.slots < len(many)
    assert len(found) == len(many)
    assert all(isinstance(detection, Detection) for _, detection in found)
