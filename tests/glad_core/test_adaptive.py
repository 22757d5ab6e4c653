"""The mechanics of ADS and SAFF that the golden numbers do not reach: the `paper` variant, switches, independence."""

from dataclasses import replace

import pytest
import torch

from glad_core import adaptive, schedule
from glad_core.bundle.model import Model, load_bundle


@pytest.fixture(scope="module")
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


def inputs(model: Model, count: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    side = model.settings.resolution // model.vae_factor
    images = torch.rand(count, 3, model.settings.resolution, model.settings.resolution, generator=generator) * 2 - 1
    shape = (count, model.vae.config.latent_channels, side, side)
    return images, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def run(model: Model, **settings) -> tuple[adaptive.Reconstruction, list[adaptive.Step]]:
    steps: list[adaptive.Step] = []
    changed = replace(model, settings=model.settings.model_copy(update=settings))
    with torch.inference_mode():
        return adaptive.reconstruct(changed, *inputs(model), on_step=steps.append), steps


@pytest.mark.parametrize("variant", ["official", "paper"])
@pytest.mark.parametrize("saff", [True, False])
def test_every_image_gets_a_step_and_its_reason(model: Model, variant: str, saff: bool) -> None:
    never, _ = run(model, variant=variant, saff=saff, delta=1e4, min_step=0)
    assert never.stop_reason == ["none"] * 3
    assert never.stop_step == [None] * 3
    below, _ = run(model, variant=variant, saff=saff, delta=1e4, min_step=200)
    assert below.stop_reason == ["min_step"] * 3
    assert all(stop is not None and stop < 200 for stop in below.stop_step)
    at_once, _ = run(model, variant=variant, saff=saff, delta=1e-4, min_step=0)
    assert at_once.stop_reason == ["difference"] * 3
    for result in (never, below, at_once):
        for stop, compared in zip(result.stop_step, result.steps, strict=True):
            assert [t for t, _ in compared] == sorted((t for t, _ in compared), reverse=True)
            assert stop is None or compared[-1][0] == stop


def test_without_delta_nothing_is_compared(model: Model) -> None:
    result, steps = run(model, delta=0.0)
    assert result.steps == [[], [], []]
    assert not any(step.compared.any() for step in steps)


def test_the_paper_variant_renoises_the_fused_features_with_the_same_noise(model: Model) -> None:
    """Eq. 7: after the stop the chain stands at the same t, on √ᾱ_t·x^f + √(1-ᾱ_t)·ε."""
    _, steps = run(model, variant="paper", delta=1e-4, min_step=0)
    first, second = steps[0], steps[1]
    assert first.map_bhw is not None
    assert first.x0_true is not None
    assert torch.equal(first.t, second.t)
    fused = adaptive.fuse(first.map_bhw, first.x0_hat, first.x0_true)
    eps = inputs(model)[1]
    torch.testing.assert_close(first.latents, schedule.add_noise(model.alphas, fused, eps, first.t))
    assert not second.compared.any()


def test_the_paper_variant_restarts_n_steps_higher_without_saff(model: Model) -> None:
    stride = model.settings.start_step // model.settings.inference_steps
    result, steps = run(model, variant="paper", saff=False, restart_margin=stride, delta=1e4, min_step=200)
    stop = result.stop_step[0]
    index = next(i for i, step in enumerate(steps) if int(step.t[0]) == stop)
    assert int(steps[index + 1].t[0]) == stop + stride


def test_the_paper_variant_predicts_the_inputs_own_noise(model: Model) -> None:
    _, official = run(model, variant="official", delta=1e4, min_step=0)
    _, paper = run(model, variant="paper", delta=1e4, min_step=0)
    assert torch.equal(official[2].x0_hat, paper[2].x0_hat)
    assert not torch.allclose(official[2].x0_true, paper[2].x0_true)


def test_fuse_keeps_at_least_half_of_the_reconstruction_and_resizes_its_mask() -> None:
    x0_hat, x0_true = torch.ones(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
    fused = adaptive.fuse(torch.tensor([[[0.0, 4.0], [0.0, 4.0]]]), x0_hat, x0_true)
    assert fused.shape == x0_hat.shape
    assert fused.min() == pytest.approx(0.5)
    assert fused.max() == pytest.approx(torch.sigmoid(torch.tensor(4.0)).item())
