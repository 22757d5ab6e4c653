from dataclasses import replace

import numpy as np
import pytest

from glad_core import adaptive, calibrated_steps, calibration, pictures
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import View
from glad_core.errors import GladError
from glad_core.good_patches import GoodPicture, remember
from glad_core.judge import detect
from glad_core.model_comparison import compare_models
from glad_core.pictures import all_framings, anomalous_pictures, score_pictures
from glad_core.stitch import combined_score
from glad_core.verdict import NotFinite, Request
from glad_core.views import Frames


def test_calibration_sets_the_steps_and_the_threshold_from_good_images(tiny_bundle, monkeypatch) -> None:
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120, 240))
    model = load_bundle(tiny_bundle)
    rng = np.random.default_rng(0)
    good = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(5)]
    judged: list[int] = []
    choice = calibration.Calibrator(model, on_image=judged.append).calibrate(good)
    settings = choice.settings
    assert choice.good_scores == {"": sorted(choice.scores.astype(np.float32).tolist())}
    assert sum(judged) == calibration.judged_images(good, settings)
    assert settings.start_step in (120, 240)
    assert settings.inference_steps == settings.start_step // 30
    assert settings.min_step == round(settings.start_step * 2 / 3)
    assert settings.delta > 0
    assert settings.score_fall is not None
    assert settings.score_guess is not None
    again = load_bundle(tiny_bundle, settings=settings)
    scores = [result.score for result in detect(again, [Request(str(i), image) for i, image in enumerate(good)])]
    assert settings.threshold == pytest.approx(max(scores), abs=1e-4)


def test_the_fast_profile_has_no_steps_and_a_threshold_of_its_own(tiny_bundle, monkeypatch) -> None:
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120,))
    model = load_bundle(tiny_bundle)
    rng = np.random.default_rng(0)
    good = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(4)]
    judged: list[int] = []
    settings = calibration.Calibrator(model, "fast", on_image=judged.append).calibrate(good).settings
    assert sum(judged) == calibration.judged_images(good, settings, "fast")
    assert settings.start_step in calibrated_steps.FAST_STEPS
    assert (settings.profile, settings.inference_steps, settings.delta) == ("fast", 1, 0)
    (result,) = detect(load_bundle(tiny_bundle, settings=settings), [Request("0", good[0])])
    assert (result.steps, result.stop_step, result.stop_reason) == ([], None, "none")
    assert settings.threshold is not None
    assert result.score <= settings.threshold + 1e-4
    assert calibration.Calibrator(replace(model, settings=settings)).calibrate(good).settings.profile == "exact"


@pytest.mark.parametrize("profile", ["exact", "fast"])
def test_images_without_a_finite_score_are_named(profile, tiny_bundle, monkeypatch) -> None:
    """One of six images overflows: no settings come of the others alone."""
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120,))
    model = load_bundle(tiny_bundle)
    rng = np.random.default_rng(0)
    good = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
    good[4][:] = 255
    real = adaptive.encode

    def overflows(model, images, noise):
        latents = real(model, images, noise)
        latents[images.flatten(1).mean(dim=1) > 0.5] = float("nan")
        return latents

    monkeypatch.setattr(adaptive, "encode", overflows)
    names = [f"/good/{index}.png" for index in range(6)]
    with pytest.raises(NotFinite, match=rf"^model {model.model_id} has no verdict on 1 of 6 .*such as /good/4.png"):
        calibration.Calibrator(model, profile).calibrate(good, names=names)
    with pytest.raises(NotFinite, match=r"no verdict on 2 of 12 .*such as image 4"):
        compare_models(model, model, good, 3, margin=0.02)
    with pytest.raises(NotFinite):
        list(detect(model, [Request("4", good[4])]))


def test_the_views_that_separate_are_kept_and_standardised(tiny_bundle, monkeypatch) -> None:
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120,))
    model = load_bundle(tiny_bundle)
    model = replace(model, settings=model.settings.model_copy(update={"views": (View(), View(kind="tiles"))}))
    rng = np.random.default_rng(0)
    pictures = []
    for size in [(64, 48), (40, 70), (50, 50)]:
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        pictures.append(Frames([framing.frame(picture) for framing in model.settings.framings()], size))
    judged: list[int] = []
    settings = calibration.Calibrator(model, on_image=judged.append).calibrate(pictures).settings
    assert sum(judged) == calibration.judged_images(pictures, model.settings)
    kept = [view.kind for view in settings.views]
    assert kept in (["squash"], ["tiles"], ["squash", "tiles"])
    # A good picture's verdict is at most the threshold that it took part in.
    again = replace(model, settings=settings)
    views = [["squash", "tiles"].index(kind) for kind in kept]
    chosen = [Frames([picture.frames[view] for view in views], picture.size) for picture in pictures]
    scores_NV = score_pictures(again, chosen, ["widget"] * 3, ["a", "b", "c"], 8, 0)
    scores = [combined_score(settings, row) for row in scores_NV.tolist()]
    assert settings.threshold == pytest.approx(max(scores), abs=1e-3)
    if len(kept) > 1:
        assert scores_NV.mean(axis=0) == pytest.approx([view.good_mean for view in settings.views], abs=1e-4)


def framed(model, images):
    """Pictures as every method sees them, and the good patches of them."""
    model = replace(model, settings=model.settings.judged_by("nearest"))
    framings = calibration.compared_framings(model.settings.judged_by("glad"), methods=True)
    seen = [Frames([framing.frame(image) for framing in framings], image.shape[:2]) for image in images]
    own = [framing.frame for framing in model.settings.framings()]
    good = [
        GoodPicture(str(number), "", Frames([frame(image) for frame in own], image.shape[:2]))
        for number, image in enumerate(images)
    ]
    return seen, remember(model, good, seed=0)


def test_the_method_that_separates_best_is_chosen(tiny_bundle, monkeypatch) -> None:
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120,))
    monkeypatch.setattr(calibrated_steps, "FAST_STEPS", (120,))
    model = load_bundle(tiny_bundle)
    rng = np.random.default_rng(0)
    board = rng.integers(0, 256, (32, 32, 3))
    good = [(board + rng.integers(0, 2, board.shape)).clip(0, 255).astype(np.uint8) for _ in range(8)]
    good, (_, patches) = framed(model, good)[0], framed(model, good[4:])
    judged: list[int] = []
    choice = calibration.Calibrator(model, on_image=judged.append).calibrate(good[:4], patches=patches)
    assert sum(judged) == calibration.judged_images(good[:4], model.settings, patches=patches)
    assert list(choice.qualities) == ["adaptive steps", "fixed steps", "a single step", "nearest good patches"]
    # The tiny model rebuilds nothing, but what differs from all that was seen is easy to tell.
    assert choice.name == "nearest good patches"
    assert choice.qualities[choice.name] == max(choice.qualities.values()) > choice.qualities["adaptive steps"]
    assert choice.settings.method == "nearest"
    assert choice.settings.threshold == pytest.approx(choice.scores.max())
    # From such a bundle a new training starts with the steps again.
    again = replace(model, settings=choice.settings, memory=[patches.memory[view] for view in choice.views])
    whole = [Frames(picture.frames[:1], picture.size) for picture in good[:4]]
    assert calibration.Calibrator(again).calibrate(whole).settings.method == "glad"
    # The gate of `glad retrain` judges either model by its own method.
    sides = [framing.side for framing in all_framings(again.settings, model.settings)]
    both = [Frames([{32: p.frames[0], 16: p.frames[1]}[side] for side in sides], p.size) for p in good[:4]]
    assert compare_models(again, model, both, 3, margin=0.0).new == 1.0


@pytest.mark.parametrize(("adaptive", "chosen"), [(0.84, "nearest good patches"), (0.86, "adaptive steps")])
def test_the_good_patches_judge_unless_another_way_is_clearly_better(tiny_bundle, monkeypatch, adaptive, chosen):
    model, good, patches = few_steps(tiny_bundle, monkeypatch, 4)
    found = iter([0.8, 0.75, 0.7, adaptive])  # the table's order, from its end
    monkeypatch.setattr(calibration.Calibrator, "_best_views", lambda *arguments: found_with(next(found), arguments))
    assert calibration.Calibrator(model).choose(good, patches=patches).name == chosen


@pytest.mark.parametrize(("first_tiles", "first"), [(100, 8), (4, 4)])
def test_a_way_not_clearly_better_on_some_pictures_is_tested_no_further(tiny_bundle, monkeypatch, first_tiles, first):
    monkeypatch.setattr(calibration, "FIRST_TILES", first_tiles)
    model, good, patches = few_steps(tiny_bundle, monkeypatch, 16)
    found = iter([0.8, 0.86, 0.82, 0.84, 0.7])
    tested = []

    def best_views(*arguments):
        tested.append(len(arguments[-1]))
        return found_with(next(found), arguments)

    monkeypatch.setattr(calibration.Calibrator, "_best_views", best_views)
    qualities = calibration.Calibrator(model).choose(good, patches=patches).qualities
    assert {name: quality.auroc for name, quality in qualities.items()} == {
        "adaptive steps": 0.7,
        "fixed steps": 0.84,
        "a single step": 0.82,
        "nearest good patches": 0.8,
    }
    assert tested == [16, first, 16, first, first]  # nearest, single, fixed, adaptive
    assert [quality.pictures for quality in qualities.values()] == [first, first, 16, 16]


def few_steps(tiny_bundle, monkeypatch, count):
    """A model with one candidate for T, random good pictures and the good patches of them."""
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120,))
    monkeypatch.setattr(calibrated_steps, "FAST_STEPS", (120,))
    model = load_bundle(tiny_bundle)
    images = list(np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
    return model, *framed(model, images)


def found_with(auroc, arguments):
    _, settings, *_, picked = arguments
    return calibration.Found([0], calibration.Quality(auroc, 1.0, len(picked)), settings)


def test_good_patches_are_compared_at_the_resolution_of_the_features(tiny_bundle, monkeypatch) -> None:
    """What is only seen at twice the resolution of the VAE: fine stripes, in pictures where it sees plain grey."""
    monkeypatch.setattr(calibrated_steps, "START_STEPS", (120,))
    monkeypatch.setattr(calibrated_steps, "FAST_STEPS", (120,))
    model = load_bundle(tiny_bundle)
    model = replace(model, settings=model.settings.model_copy(update={"feature_resolution": 64}))
    seen = model.settings.judged_by("nearest")
    assert [framing.side for framing in calibration.compared_framings(model.settings, methods=True)] == [32, 64]
    assert [framing.side for framing in calibration.compared_framings(seen, methods=False)] == [32]
    assert [framing.side for framing in seen.framings()] == [64, 32]  # half of it shows large regions better
    rng = np.random.default_rng(0)
    stripes = np.repeat(np.tile([0, 255], 32)[None, :, None], 64, 0)
    images = [(stripes + rng.integers(0, 2, (64, 64, 3))).clip(0, 255).astype(np.uint8) for _ in range(8)]
    pictures, (_, patches) = framed(model, images)[0], framed(model, images[4:])
    assert pictures[0].frames[0].std() < 20 < 100 < pictures[0].frames[1].std()
    judged: list[int] = []
    choice = calibration.Calibrator(model, on_image=judged.append).calibrate(pictures[:4], patches=patches)
    assert sum(judged) == calibration.judged_images(pictures[:4], model.settings, patches=patches)
    judge = replace(model, settings=seen, memory=patches.memory)
    grey = np.full((64, 64, 3), 128, np.uint8)
    (striped, plain) = (
        score_pictures(judge, [Frames([f.frame(image) for f in seen.framings()], (64, 64))], ["widget"], ["a"], 8, 0)
        for image in (images[0], grey)
    )
    assert plain[0, 0] > 2 * striped[0, 0]
    # A picture of another size than the method sees is refused, not enlarged in silence.
    with pytest.raises(GladError, match=r"expected uint8 32x32x3 or 64x64x3, got uint8 \(48"):
        score_pictures(judge, [Frames([grey[:48, :48], grey[:32, :32]], (64, 64))], ["widget"], ["a"], 8, 0)
    assert choice.settings.method == "nearest"
    assert {framing.side for framing in choice.settings.framings()} <= {64, 32}


def test_an_anomaly_is_seen_in_every_view_and_nothing_else_differs(tiny_bundle) -> None:
    settings = load_bundle(tiny_bundle).settings.model_copy(update={"views": (View(), View(kind="tiles"))})
    picture = np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    frames = Frames([framing.frame(picture) for framing in settings.framings()], (90, 70))
    (good,), (bad,) = anomalous_pictures([frames], settings.framings(), 32, 3, seed=1)
    for before, after, framing in zip(good.frames, bad.frames, settings.framings(), strict=True):
        assert before.shape == after.shape == (*framing.size(90, 70), 3)
        changed = (before != after).any(axis=2)
        assert 0 < changed.mean() < 0.8
    assert (good.frames[1] == frames.frames[1]).all()


def test_equal_tiles_are_judged_once(tiny_bundle, monkeypatch) -> None:
    model = load_bundle(tiny_bundle)
    asked: list[str] = []
    real = pictures.run
    monkeypatch.setattr(
        pictures, "run", lambda engine, requests: real(engine, [r for r in requests if not asked.append(r.image_id)])
    )
    rng = np.random.default_rng(3)
    one, other = (rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(2))
    done: list[int] = []
    found = pictures.judge_all(model, [one, other, one.copy()], ["widget"] * 3, ["a", "b", "c"], 8, 0, done.append)
    assert len(asked) == 2
    assert sum(done) == 3
    assert found[0] is found[2]
    assert found[0].score != found[1].score
