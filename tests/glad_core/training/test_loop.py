from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch

from glad_core import features
from glad_core.bundle.model import Model, load_bundle
from glad_core.errors import GladError
from glad_core.training import losses, samples
from glad_core.training.loop import TrainState, category_prompts, fine_tune, lr_factor
from glad_core.training.recipe import Recipe

RECIPE = Recipe(steps=6, batch_size=4, learning_rate=1e-3, lr_schedule="cosine", ema_decay=0.9)
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(10)]


@pytest.fixture
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


def atp(model: Model, recipe: Recipe = RECIPE) -> losses.AtpLoss:
    with torch.no_grad():
        posterior = model.vae.encode(losses.to_pixels(torch.from_numpy(np.stack(IMAGES)))).latent_dist
    return losses.AtpLoss(
        model.unet,
        model.vae,
        model.alphas,
        (posterior.mean, posterior.std),
        model.prompt_cond,
        torch.zeros(len(IMAGES), dtype=torch.long),
        blend=recipe.blend,
    )


def rows(recipe: Recipe, first_step: int = 0, part: samples.Part = "unet") -> Iterator[losses.Rows]:
    for step in range(first_step, recipe.steps):
        places = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        chosen = [samples.sample_at(recipe, place, len(IMAGES)) for place in places]
        made = samples.make_rows([IMAGES[sample.index] for sample in chosen], chosen, recipe, part)
        yield {name: torch.from_numpy(values) for name, values in made.items()}


def run(state: TrainState, recipe: Recipe, limit: int = 10**6, part: samples.Part = "unet") -> list[float]:
    return [step.loss for step in islice(fine_tune(state, rows(recipe, state.step, part), recipe), limit)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_ends_with_the_same_weights(tiny_bundle, optimizer: str) -> None:
    recipe = RECIPE.model_copy(update={"optimizer": optimizer})
    state = TrainState.start(atp(load_bundle(tiny_bundle)), recipe)
    whole = run(state, recipe)
    state.finish()

    first = TrainState.start(atp(load_bundle(tiny_bundle)), recipe)
    head = run(first, recipe, limit=2)
    second = TrainState.start(atp(load_bundle(tiny_bundle)), recipe)
    second.load_state_dict(first.state_dict())
    tail = run(second, recipe)
    second.finish()
    assert head + tail == whole
    for name, weight in second.loss.state_dict().items():
        assert torch.equal(weight, state.loss.state_dict()[name]), name


def test_micro_batches_add_up_to_the_whole_batch(tiny_bundle) -> None:
    whole, parts = (
        TrainState.start(atp(load_bundle(tiny_bundle)), RECIPE.model_copy(update={"micro_batch": micro}))
        for micro in (None, 3)
    )
    for state, micro in ((whole, None), (parts, 3)):
        run(state, RECIPE.model_copy(update={"micro_batch": micro}), limit=1)
    for (name, a), b in zip(whole.loss.named_parameters(), parts.loss.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_training_lowers_the_loss(model: Model) -> None:
    recipe = Recipe(steps=60, batch_size=4, learning_rate=3e-3)
    found = run(TrainState.start(atp(model), recipe), recipe)
    assert sum(found[-10:]) < sum(found[:10])


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_touched(model: Model) -> None:
    recipe = Recipe(steps=3, batch_size=4, learning_rate=1e-3)
    loss = atp(model)
    state = TrainState.start(loss, recipe)
    loss.clean[0][:] = float("nan")
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(GladError, match="diverged at step 1"):
        run(state, recipe)
    assert all(torch.equal(before[name], value) for name, value in loss.state_dict().items())


def test_every_image_is_seen_once_an_epoch() -> None:
    order = [samples.sample_at(RECIPE, position, 10) for position in range(20)]
    seen = [sample.index for sample in order]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert len({sample.anomaly_seed for sample in order} | {sample.noise_seed for sample in order}) == 40


def test_the_report_splits_the_loss_without_losing_any_of_it(model: Model) -> None:
    loss = atp(model)
    TrainState.start(loss, RECIPE)
    batch = next(rows(RECIPE.model_copy(update={"anomaly_probability": 1.0, "batch_size": 8})))
    value, report = loss(batch)
    bands = [report[f"loss_t{low}"] for low in losses.BANDS]
    assert sum(count for _, count in bands) == 8
    assert sum(total for total, _ in bands) / 8 == pytest.approx(value.item(), rel=1e-5)
    regions = [report["loss_normal"], report["loss_abnormal"]]
    assert sum(total for total, _ in regions) / sum(count for _, count in regions) == pytest.approx(value.item())
    assert all(count > 0 for _, count in regions)


def test_unchanged_images_share_the_latents_of_their_twins(model: Model) -> None:
    images = losses.to_pixels(torch.from_numpy(np.stack(IMAGES[:3])))
    changed = torch.tensor([False, True, False])
    anomalous = images.clone()
    anomalous[1, :, :8] = 1.0
    with torch.no_grad():
        clean = model.vae.encode(images).latent_dist
        noise = torch.randn(clean.mean.shape, generator=torch.Generator().manual_seed(1))
        x, x_a = losses.encode_pair(model.vae, clean.mean, clean.std, anomalous[changed], changed, noise)
        posterior = model.vae.encode(anomalous).latent_dist
    direct = (posterior.mean + posterior.std * noise) * model.vae.config.scaling_factor
    torch.testing.assert_close(x_a, direct, rtol=0, atol=1e-5)
    assert torch.equal(x[0], x_a[0])
    assert not torch.equal(x[1], x_a[1])


def test_the_target_is_the_plain_noise_where_nothing_is_wrong() -> None:
    alphas = torch.linspace(0.999, 0.005, 1000)
    x, eps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    t = torch.tensor([5, 900])
    assert torch.equal(losses.atp_target(alphas, x, x, eps, t), eps)
    x_a = x.clone()
    x_a[:, :, 0] += 1
    target = losses.atp_target(alphas, x_a, x, eps, t)
    assert torch.equal(target[:, :, 1:], eps[:, :, 1:])
    factor = (alphas[t] / (1 - alphas[t])).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(target[:, :, 0], eps[:, :, 0] - factor, rtol=1e-5, atol=1e-5)


def test_dino_adaptation_trains_the_mlps_of_the_used_blocks_and_brings_features_closer(tiny_bundle) -> None:
    model, other = load_bundle(tiny_bundle), load_bundle(tiny_bundle)
    rebuilt = torch.from_numpy(np.stack(IMAGES)).roll(2, dims=1)
    recipe = Recipe(steps=40, batch_size=4, learning_rate=1e-2, weight_decay=0)
    loss = losses.FeatureLoss(other.features, model.features, rebuilt, size=32, keep=0.01)
    trained = {name for name, weight in loss.named_parameters() if weight.requires_grad}
    used = features.used_blocks(model.features)
    assert trained
    assert all(any(name.startswith(f"vit.blocks.{block - 1}.mlp.") for block in used) for name in trained)
    frozen = {name: value.clone() for name, value in loss.state_dict().items() if name not in trained}
    found = run(TrainState.start(loss, recipe), recipe, part="dino")
    assert np.mean(found[-4:]) < 0.7 * np.mean(found[:4])
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in frozen.items())


def test_vae_adaptation_brings_pictures_closer(model: Model) -> None:
    recipe = Recipe(steps=40, batch_size=4, learning_rate=3e-3, weight_decay=0)
    state = TrainState.start(losses.CodecLoss(model.vae, model.features), recipe)
    steps = list(fine_tune(state, rows(recipe, part="vae"), recipe))
    assert {"pixel_error", "feature_distance", "kl"} == steps[0].report.keys()
    assert steps[-1].report["pixel_error"][0] < 0.9 * steps[0].report["pixel_error"][0]


def test_prompts_are_learned_only_where_nobody_made_them(model: Model) -> None:
    single, learn = category_prompts(model, ["part"])
    assert torch.equal(single, model.prompt_cond)
    assert not learn
    several, learn = category_prompts(model, ["a", "b"])
    assert several.shape == (2, *model.prompt_cond.shape[1:])
    assert learn
    assert not torch.equal(several[0], several[1])
    assert torch.equal(category_prompts(model, ["b", "a"])[0], several.flip(0))
    model.prompts.update(a=several[:1], b=several[1:])
    known, learn = category_prompts(model, ["b"])
    assert torch.equal(known, several[1:])
    assert not learn


def test_the_learning_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, lr_schedule="cosine")
    factors = [lr_factor(recipe, step) for step in range(100)]
    assert factors[0] < factors[4] == pytest.approx(1)
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[-1] < 0.01
    assert lr_factor(Recipe(), 7) == 1
