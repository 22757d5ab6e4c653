import numpy as np
import pytest
import torch
from tiny_training import IMAGES, RECIPE, make_atp_loss, make_batches, train

from glad_core.bundle.model import Model, load_bundle
from glad_core.training import losses
from glad_core.training.loop import TrainState, fine_tune
from glad_core.training.recipe import Recipe


@pytest.fixture
def model(tiny_bundle) -> Model:
    return load_bundle(tiny_bundle)


def test_the_report_splits_the_loss_without_losing_any_of_it(model: Model) -> None:
    loss = make_atp_loss(model)
    TrainState.start(loss, RECIPE)
    batch = next(make_batches(RECIPE.model_copy(update={"anomaly_probability": 1.0, "batch_size": 8})))
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
    used = model.features.layers
    assert trained
    assert all(any(name.startswith(f"backbone.net.blocks.{block}.mlp.") for block in used) for name in trained)
    frozen = {name: value.clone() for name, value in loss.state_dict().items() if name not in trained}
    history = train(TrainState.start(loss, recipe), recipe, part="dino")
    assert np.mean(history[-4:]) < 0.7 * np.mean(history[:4])
    assert all(torch.equal(loss.state_dict()[name], value) for name, value in frozen.items())


def test_vae_adaptation_brings_pictures_closer(model: Model) -> None:
    recipe = Recipe(steps=40, batch_size=4, learning_rate=3e-3, weight_decay=0)
    state = TrainState.start(losses.CodecLoss(model.vae, model.features), recipe)
    steps = list(fine_tune(state, make_batches(recipe, part="vae"), recipe))
    assert {"pixel_error", "feature_distance", "kl"} == steps[0].report.keys()
    assert steps[-1].report["pixel_error"][0] < 0.9 * steps[0].report["pixel_error"][0]
