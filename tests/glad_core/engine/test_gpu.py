"""The engine on an NVIDIA GPU, with real weights; everything else in this folder runs on a CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from glad_core.bundle.glad_json import read_description
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

MARGIN = 5e-3  # least distance of δ from a step score, relative; float16 scores round by 5e-4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def requests():
    side = read_description(SMALL_BUNDLE).settings["resolution"]
    kinds = [None, *DEFECTS, None]
    boards = [make_board(board_rng(3, kind or "good", index), kind)[0] for index, kind in enumerate(kinds)]
    return [Request(str(index), resize(board, side)) for index, board in enumerate(boards)]


@pytest.fixture(scope="module")
def model(requests):
    """The small model, its δ moved into the widest gap between the images' step scores: rounding decides no stop."""
    set_up(gpu=True, threads=1)
    small = load_bundle(SMALL_BUNDLE, "cuda")
    unstopped = replace(small, settings=small.settings.model_copy(update={"delta": 1e4}))
    scores = np.sort([score for detection in detect(unstopped, requests) for _, score in detection.steps])
    near = scores[(scores > 0.7 * small.settings.delta) & (scores < 1.5 * small.settings.delta)]
    widest = np.diff(near).argmax()
    delta = float(near[widest : widest + 2].mean())
    assert near[widest + 1] - near[widest] > 2 * MARGIN * delta
    return replace(small, settings=small.settings.model_copy(update={"delta": delta}))


@pytest.fixture(scope="module")
def references(model, requests):
    """The reference loop's verdicts on the GPU, each image judged alone."""
    return {request.image_id: next(iter(detect(model, [request]))) for request in requests}


def assert_agrees(detection, expected, tolerance=1e-3):
    assert isinstance(detection, Detection), detection
    assert (detection.stop_step, detection.stop_reason) == (expected.stop_step, expected.stop_reason)
    assert detection.score == pytest.approx(expected.score, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("search", ["scan", "guarded"])
@pytest.mark.parametrize("slots", [1, 4])
def test_same_answers_as_the_reference(model, requests, references, search, slots):
    verdicts = dict(run(Engine(model, slots, search=search), requests))
    for request in requests:
        assert_agrees(verdicts[request], references[request.image_id])
    assert len({detection.stop_step for detection in references.values()}) > 1


def test_same_answers_as_a_cpu(model, requests, references):
    cpu = load_bundle(SMALL_BUNDLE, settings=model.settings)
    for request, expected in zip(requests, detect(cpu, requests), strict=True):
        assert_agrees(references[request.image_id], expected, tolerance=1e-2)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_lower_precision_is_near(model, requests, autocast):
    near = replace(model, autocast=autocast, settings=model.settings.model_copy(update={"delta": 0.0}))
    full = replace(near, autocast=None)
    expected = dict(run(Engine(full, 4, search="scan"), requests))
    for request, detection in run(Engine(near, 4, search="scan"), requests):
        assert detection.score == pytest.approx(expected[request].score, rel=0.1)
        assert np.isfinite(detection.anomaly_map).all()


def test_norms_keep_the_precision_of_autocast():
    norm = torch.nn.GroupNorm(2, 6).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        x = torch.randn(3, 6, 5, 7, device="cuda", dtype=torch.bfloat16)
        in_float32 = norm(x)
        keep_norms_low(norm)
        in_bfloat16 = norm(x)
    assert (in_float32.dtype, in_bfloat16.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(in_bfloat16.float(), in_float32, atol=0.02, rtol=0.01)


def test_compiled_networks_give_the_same_and_never_compile_in_flight(model, requests, references):
    engine = Engine(load_bundle(SMALL_BUNDLE, "cuda", settings=model.settings), 2, compiled=True)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    verdicts = dict(run(engine, requests))
    for request in requests:
        assert_agrees(verdicts[request], references[request.image_id], tolerance=1e-2)
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
        verdicts = list(run(engine, many))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.slots < len(many)
    assert len(verdicts) == len(many)
    assert all(isinstance(detection, Detection) for _, detection in verdicts)
