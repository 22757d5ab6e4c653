import numpy as np
import pytest
import torch

pytest.importorskip("skimage", reason="needs the extra 'small-model'")

from glad_core.images import to_tensor
from pipelines.small_model import codec as small_codec
from pipelines.small_model.pictures import make_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool.npz", boards=4, photos=20, textures=4)


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
