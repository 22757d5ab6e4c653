from itertools import islice

import pytest
import torch

from glad_core import training
from glad_core.bundle import Model, load_bundle
from glad_core.training import Recipe, TrainState


@pytest.fixture
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


RECIPE = Recipe(steps=6, batch_size=4, learning_rate=1e-3, lr_schedule="cosine", ema_decay=0.9)
IMAGES = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def steps_of(model: Model, state: TrainState, recipe: Recipe, limit: int = 10**6) -> list[float]:
    loop = training.fine_tune(
        state, model.vae, model.alphas, model.prompt_cond, lambda rows: IMAGES[rows], len(IMAGES), recipe
    )
    return list(islice(loop, limit))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_weights(tiny_bundle, optimizer: str) -> None:
    recipe = RECIPE.model_copy(update={"optimizer": optimizer})
    whole = load_bundle(tiny_bundle)
    state = TrainState.start(whole.unet, recipe)
    losses = steps_of(whole, state, recipe)
    expected = state.finish().state_dict()

    killed = load_bundle(tiny_bundle)
    first = TrainState.start(killed.unet, recipe)
    head = steps_of(killed, first, recipe, limit=2)
    resumed = load_bundle(tiny_bundle)
    second = TrainState.start(resumed.unet, recipe)
    second.load_state_dict(first.state_dict())
    tail = steps_of(resumed, second, recipe)
    assert second.step == recipe.steps
    assert head + tail == losses
    for name, weight in second.finish().state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_training_lowers_the_loss(model: Model) -> None:
    recipe = Recipe(steps=60, batch_size=4, learning_rate=3e-3)
    losses = steps_of(model, TrainState.start(model.unet, recipe), recipe)
    assert sum(losses[-10:]) < sum(losses[:10])


def test_every_image_is_seen_once_an_epoch() -> None:
    recipe = Recipe(steps=5, batch_size=4)
    seen = [index for step in range(5) for index in training._sampled(recipe, step, 10)[0]]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    seeds = [seed for step in range(5) for seed in training._sampled(recipe, step, 10)[1]]
    assert len(set(seeds)) == 20


def test_unchanged_images_share_the_latents_of_their_twins(model: Model) -> None:
    anomalous = IMAGES[:3].clone()
    anomalous[1, :, :8] = 1.0
    with torch.no_grad():
        mean, std = training.clean_posteriors(model.vae, lambda rows: IMAGES[rows], 3, 2)
        x, x_a = training.encode_pair(model.vae, mean, std, IMAGES[:3], anomalous, torch.Generator().manual_seed(1))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        posterior = model.vae.encode(anomalous).latent_dist
    direct = (posterior.mean + posterior.std * noise) * model.vae.config.scaling_factor
    torch.testing.assert_close(x_a, direct, rtol=0, atol=1e-5)
    assert torch.equal(x[0], x_a[0])
    assert not torch.equal(x[1], x_a[1])


def test_the_target_is_the_plain_noise_where_nothing_is_wrong() -> None:
    alphas = torch.linspace(0.999, 0.005, 1000)
    x, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    t = torch.tensor([5, 900])
    assert torch.equal(training.atp_target(alphas, x, x, eps, t), eps)
    x_a = x.clone()
    x_a[:, :, 0] += 1
    target = training.atp_target(alphas, x_a, x, eps, t)
    assert torch.equal(target[:, :, 1:], eps[:, :, 1:])
    factor = (alphas[t] / (1 - alphas[t])).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(target[:, :, 0], eps[:, :, 0] - factor, rtol=1e-5, atol=1e-5)


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, lr_schedule="cosine")
    factors = [training.lr_factor(recipe, step) for step in range(100)]
    assert factors[0] < factors[4] == pytest.approx(1)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] < 0.01
    assert training.lr_factor(Recipe(), 7) == 1
