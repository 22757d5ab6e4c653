"""The engine against the reference loop, whatever comes when and whatever fails on the way."""

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
DELTAS = (0.0, 0.0036, 0.0042, 0.005, 1e4)
KINDS = [
    {"variant": "official"},
    {"variant": "official", "saff": False, "noise_index": "T-1"},
    {"variant": "official", "guidance_scale": 3.0, "min_step": 0},
    {"variant": "paper"},
    {"variant": "paper", "saff": False, "restart_margin": 200},
    {"profile": "fast", "start_step": 150, "compare_with": "round_trip"},
]


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
    """What the reference loop says, each image judged alone; by kind and δ."""
    found = {}
    for kind, changes in enumerate(KINDS):
        for delta in DELTAS:
            changed = with_settings(model, delta=delta, **changes)
            alone = [next(iter(detect(changed, [request]))) for request in requests]
            found[kind, delta] = {detection.image_id: detection for detection in alone}
    return found


def with_settings(model: Model, **changes) -> Model:
    return replace(model, settings=model.settings.model_copy(update=changes))


def agrees(found: Detection, expected: Detection, delta: float) -> bool:
    """The same verdict; False where a score is so near to δ that rounding decides."""
    # The maps are float16 of values up to 4: one unit in their last place is 2e-3.
    if found.stop_step != expected.stop_step and any(abs(score - delta) < 1e-4 for _, score in expected.steps):
        return False
    assert (found.stop_step, found.stop_reason) == (expected.stop_step, expected.stop_reason)
    assert found.score == pytest.approx(expected.score, abs=1e-4)
    np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-4, rtol=1e-3)
    assert np.abs(found.reconstruction.astype(int) - expected.reconstruction).max() <= 1
    return True


@given(
    kind=st.integers(0, len(KINDS) - 1),
    delta=st.sampled_from(DELTAS),
    order=st.permutations(range(IMAGES)),
    slots=st.integers(1, IMAGES + 1),
    pauses=st.lists(st.integers(0, 4), min_size=IMAGES, max_size=IMAGES),
    guarded=st.booleans(),
    guess=st.sampled_from([None, (-6.0, 0.0, 0.1, 0.0), (-8.0, 10.0, 0.0, 5.0), (5.0, 0.0, 0.0, 0.0)]),
)
@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_same_answers_as_the_reference_in_any_order_with_any_number_of_slots(
    model, requests, references, kind, delta, order, slots, pauses, guarded, guess
):
    # A fall no score can have: the guarded search then has to find exactly what the scan finds.
    hints = {"score_fall": 10.0, "score_guess": guess}
    bounded = with_settings(model, delta=delta, **hints, **KINDS[kind])
    engine = Engine(bounded, slots, search="guarded" if guarded else "scan")
    verdicts = []
    for place, pause in zip(order, pauses, strict=True):
        engine.submit(requests[place])
        for _ in range(pause):
            verdicts += engine.tick()
    while engine.busy:
        verdicts += engine.tick()
    assert sorted(int(request.image_id) for request, _ in verdicts) == list(range(IMAGES))
    near = 0
    for request, found in verdicts:
        assert isinstance(found, Detection)
        near += not agrees(found, references[kind, delta][request.image_id], delta)
        if not guarded:
            expected = references[kind, delta][request.image_id].steps
            assert [t for t, _ in found.steps] == [t for t, _ in expected] or near
    assert near <= 1


def test_images_stop_at_different_steps_and_for_every_reason(references):
    """Or the property above would say little."""
    stops = {found.stop_step for found in references[0, 0.0042].values()}
    reasons = {found.stop_reason for of in references.values() for found in of.values()}
    assert len(stops) >= 2
    assert reasons == {"difference", "min_step", "none"}


def test_the_guarded_search_compares_less_and_finds_the_same(model, requests, references):
    scores = np.array([[score for _, score in found.steps] for found in references[0, 1e4].values()])
    fall = largest_fall(scores)
    delta = float(np.quantile(scores.max(axis=1), 0.5)) + 1e-4
    counted = {}
    for search in ("scan", "guarded"):
        changed = with_settings(model, delta=delta, score_fall=fall)
        found = {request.image_id: verdict for request, verdict in run(Engine(changed, 3, search=search), requests)}
        counted[search] = {key: (verdict.stop_step, verdict.stop_reason) for key, verdict in found.items()}
        counted[search, "comparisons"] = sum(len(verdict.steps) for verdict in found.values())
    assert counted["scan"] == counted["guarded"]
    assert counted["guarded", "comparisons"] < counted["scan", "comparisons"]


def test_slots_are_full_while_images_wait(model, requests):
    engine = Engine(with_settings(model, delta=0.0042), 3)
    many = [replace(requests[index % IMAGES], image_id=str(index)) for index in range(40)]
    assert len(list(run(engine, many))) == 40
    assert engine.occupancy > 0.95


def test_too_large_a_batch_for_the_memory_shrinks_and_nothing_is_lost(model, requests, monkeypatch):
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


def test_a_failure_that_passes_loses_nothing_and_slots_come_back(model, requests, monkeypatch):
    real, calls = adaptive.predict_noise, []

    def hiccup(*args):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("hiccup")
        return real(*args)

    monkeypatch.setattr(adaptive, "predict_noise", hiccup)
    engine = Engine(model, 4)
    assert all(isinstance(verdict, Detection) for _, verdict in run(engine, requests))
    assert engine.limit == engine.slots == 4


def test_a_tick_with_nothing_to_do_does_nothing(model, monkeypatch):
    monkeypatch.setattr(Engine, "_after_failure", lambda self, error: pytest.fail(f"failed on nothing: {error}"))
    engine = Engine(model, 2)
    assert engine.tick() == []
    assert not engine.busy


def test_images_that_do_not_fit_are_refused_when_submitted(model):
    with pytest.raises(GladError, match="resize it to the bundle's resolution"):
        Engine(model, 2).submit(Request("x", np.zeros((8, 8, 3), np.uint8)))


def test_guarded_needs_its_bound(model):
    with pytest.raises(GladError, match="glad calibrate"):
        Engine(model, 2, search="guarded")
    assert Engine(model, 2).search == "scan"
    assert Engine(with_settings(model, score_fall=0.1), 2).search == "guarded"


def test_compiled_networks_give_the_same_and_never_compile_in_flight(tiny_bundle, requests, references, monkeypatch):
    # Tracing decides what is compiled again; what the traces are turned into (slowly, by Inductor) is torch's affair.
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: real(self, backend="eager", **kwargs))
    model = load_bundle(tiny_bundle)
    engine = Engine(with_settings(model, delta=0.0042, **KINDS[0]), 3, compiled=True)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert compiled > 0
    for request, found in run(engine, requests):
        assert isinstance(found, Detection), found
        agrees(found, references[0, 0.0042][request.image_id], 0.0042)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_lower_precision_is_near(tiny_bundle, requests, references):
    model = load_bundle(tiny_bundle, autocast=torch.bfloat16)
    for request, found in run(Engine(with_settings(model, delta=1e4, **KINDS[0]), 4), requests):
        assert isinstance(found, Detection)
        assert found.score == pytest.approx(references[0, 1e4][request.image_id].score, rel=0.1)
