"""The engine against the reference loop, in any order of arrival and with failures on the way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from glad_core import adaptive
from glad_core.bundle.model import Model, load_bundle
from glad_core.engine.base import run
from glad_core.engine.engine import Engine
from glad_core.engine.search import largest_fall
from glad_core.errors import GladError
from glad_core.judge import detect
from glad_core.verdict import Detection, Request

IMAGES = 7
# In gaps between the images' step scores, so that rounding never decides where an image stops; 0 compares nothing, the
# next stops all images at the first step, 1e4 none.
DELTAS = {
    "official": (0.0, 0.0015, 0.0488, 0.0604, 0.144, 0.3727, 1e4),
    "paper": (0.0, 0.0015, 0.0245, 0.2892, 0.773, 1e4),
}
MARGIN = 1e-3  # least distance of δ from a step score; float16 scores round by 2.4e-4 at most
KINDS = [
    {"variant": "official"},
    {"variant": "official", "saff": False, "noise_index": "T-1"},
    {"variant": "official", "guidance_scale": 3.0, "min_step": 0},
    {"variant": "paper"},
    {"variant": "paper", "saff": False, "restart_margin": 200},
    {"variant": "official", "profile": "fast", "start_step": 150, "compare_with": "round_trip"},
]
CASES = [(kind, delta) for kind, changes in enumerate(KINDS) for delta in DELTAS[changes["variant"]]]
SPLIT = (0, 0.0604)  # a case whose images stop early, at different steps
LATE = (0, 0.3727)  # and one whose images stop at the last step that is compared


@pytest.fixture(scope="module")
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


@pytest.fixture(scope="module")
def requests(model: Model) -> list[Request]:
    side = model.settings.resolution
    pictures = np.random.default_rng(5).integers(0, 256, (IMAGES, side, side, 3)).astype(np.uint8)
    # From flat to busy, so that they stop at different steps.
    return [
        Request(str(index), (128 + (picture.astype(int) - 128) * index // IMAGES).astype(np.uint8))
        for index, picture in enumerate(pictures)
    ]


@pytest.fixture(scope="module")
def references(model: Model, requests: list[Request]) -> dict[tuple[int, float], dict[str, Detection]]:
    """The reference loop's verdicts, each image judged alone, by case and image id."""
    verdicts = {}
    for kind, delta in CASES:
        changed = with_settings(model, delta=delta, **KINDS[kind])
        alone = [next(iter(detect(changed, [request]))) for request in requests]
        verdicts[kind, delta] = {detection.image_id: detection for detection in alone}
    return verdicts


def with_settings(model: Model, **changes) -> Model:
    return replace(model, settings=model.settings.model_copy(update=changes))


def assert_agrees(detection: Detection | Exception, expected: Detection) -> None:
    assert isinstance(detection, Detection), detection
    assert (detection.stop_step, detection.stop_reason) == (expected.stop_step, expected.stop_reason)
    assert detection.score == pytest.approx(expected.score, abs=1e-4)
    # The maps are float16 of values up to 4: one unit in their last place is 2e-3.
    np.testing.assert_allclose(detection.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=1e-3)
    assert np.abs(detection.reconstruction.astype(int) - expected.reconstruction).max() <= 1


def test_no_step_score_is_near_delta(references):
    """Or rounding could decide where an image stops, and the engine could not be held to the reference."""
    for (kind, delta), verdicts in references.items():
        # The scores up to the stop, and those that a guarded search may compare after it.
        unstopped = references[kind, 1e4]
        scores = [score for each in (verdicts, unstopped) for one in each.values() for _, score in one.steps]
        assert all(abs(score - delta) > MARGIN for score in scores if delta > 0), (kind, delta)


def test_images_stop_at_different_steps_and_for_every_reason(references):
    """Or the property below would say little."""
    for kind, changes in enumerate(KINDS[:5]):
        stops = [{one.stop_step for one in references[kind, d].values()} for d in DELTAS[changes["variant"]]]
        assert sum(len(steps) >= 2 for steps in stops) >= 3
    reasons = {one.stop_reason for verdicts in references.values() for one in verdicts.values()}
    assert reasons == {"difference", "min_step", "none"}


@given(
    case=st.sampled_from(CASES),
    order=st.permutations(range(IMAGES)),
    slots=st.integers(1, IMAGES + 1),
    pauses=st.lists(st.integers(0, 4), min_size=IMAGES, max_size=IMAGES),
    guarded=st.booleans(),
    guess=st.sampled_from([None, (-6.0, 0.0, 0.1, 0.0), (-8.0, 10.0, 0.0, 5.0), (5.0, 0.0, 0.0, 0.0)]),
)
@hypothesis_settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_answers_as_the_reference_in_any_order_with_any_number_of_slots(
    model, requests, references, case, order, slots, pauses, guarded, guess
):
    kind, delta = case
    # No score falls by so much: the guarded search has to find exactly what the scan finds.
    hints = {"score_fall": 10.0, "score_guess": guess}
    bounded = with_settings(model, delta=delta, **hints, **KINDS[kind])
    engine = Engine(bounded, slots, search="guarded" if guarded else "scan")
    verdicts = []
    for index, pause in zip(order, pauses, strict=True):
        engine.submit(requests[index])
        for _ in range(pause):
            verdicts += engine.tick()
    while engine.busy:
        verdicts += engine.tick()
    assert sorted(int(request.image_id) for request, _ in verdicts) == list(range(IMAGES))
    for request, detection in verdicts:
        expected = references[case][request.image_id]
        assert_agrees(detection, expected)
        if not guarded:
            assert [t for t, _ in detection.steps] == [t for t, _ in expected.steps]
            scores = [score for _, score in expected.steps]
            np.testing.assert_allclose([score for _, score in detection.steps], scores, atol=MARGIN / 2)


def test_the_guarded_search_compares_less_and_finds_the_same(model, requests, references):
    kind, delta = LATE
    scores = np.array([[score for _, score in detection.steps] for detection in references[kind, 1e4].values()])
    changed = with_settings(model, delta=delta, score_fall=largest_fall(scores), **KINDS[kind])
    comparisons = {}
    for search in ("scan", "guarded"):
        verdicts = dict(run(Engine(changed, 3, search=search), requests))
        for request, detection in verdicts.items():
            assert_agrees(detection, references[LATE][request.image_id])
        comparisons[search] = sum(len(detection.steps) for detection in verdicts.values())
    assert comparisons["guarded"] < comparisons["scan"]


def test_slots_are_full_while_images_wait(model, requests):
    engine = Engine(with_settings(model, delta=SPLIT[1]), 3)
    many = [replace(requests[index % IMAGES], image_id=str(index)) for index in range(40)]
    assert len(list(run(engine, many))) == 40
    assert engine.occupancy > 0.95


def test_a_batch_too_large_for_the_memory_shrinks_and_nothing_is_lost(model, requests, monkeypatch):
    real = adaptive.predict_noise

    def small_device(model, x, t, prompts):
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, x, t, prompts)

    monkeypatch.setattr(adaptive, "predict_noise", small_device)
    engine = Engine(model, 6)
    verdicts = list(run(engine, requests))
    assert all(isinstance(verdict, Detection) for _, verdict in verdicts)
    assert len(verdicts) == IMAGES
    assert engine.slots <= 2


def test_after_a_single_failure_nothing_is_lost_and_all_slots_are_used_again(model, requests, monkeypatch):
    real, calls = adaptive.predict_noise, []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("fails once")
        return real(*args)

    monkeypatch.setattr(adaptive, "predict_noise", fail_once)
    engine = Engine(model, 4)
    assert all(isinstance(verdict, Detection) for _, verdict in run(engine, requests))
    assert engine.limit == engine.slots == 4


def test_a_tick_without_images_does_nothing(model, monkeypatch):
    monkeypatch.setattr(Engine, "_after_failure", lambda self, error: pytest.fail(f"failed without images: {error}"))
    engine = Engine(model, 2)
    assert engine.tick() == []
    assert not engine.busy


def test_guarded_needs_its_bound(model):
    with pytest.raises(GladError, match="glad calibrate"):
        Engine(model, 2, search="guarded")
    assert Engine(model, 2).search == "scan"
    assert Engine(with_settings(model, score_fall=0.1), 2).search == "guarded"


def test_compiled_networks_give_the_same_and_never_compile_in_flight(tiny_bundle, requests, references, monkeypatch):
    # Tracing decides what is compiled again. What torch makes of the traces is slow and not tested here.
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: real(self, backend="eager", **kwargs))
    model = load_bundle(tiny_bundle)
    kind, delta = SPLIT
    engine = Engine(with_settings(model, delta=delta, **KINDS[kind]), 3, compiled=True)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    for request, detection in run(engine, requests):
        assert_agrees(detection, references[SPLIT][request.image_id])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_lower_precision_is_near(tiny_bundle, requests, references):
    model = load_bundle(tiny_bundle, autocast=torch.bfloat16)
    for request, detection in run(Engine(with_settings(model, delta=1e4, **KINDS[0]), 4), requests):
        assert isinstance(detection, Detection), detection
        assert detection.score == pytest.approx(references[0, 1e4][request.image_id].score, rel=0.1)
