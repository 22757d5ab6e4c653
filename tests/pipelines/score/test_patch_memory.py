import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from cluster.storage import Storage
from glad_core import good_patches
from glad_core.bundle.glad_json import read_description, update_settings
from glad_core.bundle.settings import Settings, View
from glad_core.engine import nearest
from glad_core.errors import GladError
from pipelines.score import patch_memory
from pipelines.score.patch_memory import build_memory, read_memory

STORAGE = Storage()
GOOD = torch.tensor([[0.0, 1.0]])
MEMORY = {"good_patches.0": torch.zeros(2, 3), "whitening.0": torch.zeros(4, 3), "good": GOOD, "scores": GOOD[0]}


@pytest.fixture
def build(tiny_bundle, photos, tmp_path):
    """Build a memory of the twelve photos; returns its location."""
    model_id, out = read_description(tiny_bundle).model_id, str(tmp_path / "memory.safetensors")

    def build(model_id=model_id):
        build_memory(str(photos), str(tiny_bundle), model_id, STORAGE, out, "cpu", seed=0)
        return out

    return build


def test_what_is_built_is_read(build) -> None:
    memory = read_memory(build(), STORAGE)
    assert len(memory.patches) == len(memory.good) == 2  # the whole, and at half the side
    assert {kept.whitening.shape for kept in memory.patches} == {(4 * 32 + 1, 4 * 32)}
    assert [kept.patches.shape for kept in memory.patches] == [(12 * 16, 4 * 32), (12 * 4, 4 * 32)]
    assert all(spread > 0 for _, spread in memory.good)
    assert memory.threshold is None  # too few for one
    assert [memory.p_value(score, None) for score in (-1e9, 1e9)] == [1.0, 1 / 13]


def test_what_is_left_out_of_the_good_images_is_counted_by_kind(tiny_bundle, photos, tmp_path, monkeypatch) -> None:
    good = tmp_path / "good"
    shutil.copytree(photos, good)
    (good / "empty.png").write_bytes(b"")
    for number in range(2):
        (good / f"page{number}.png").write_bytes(b"<html>")
    (good / ".hidden.png").write_bytes(b"")
    frames = [Image.new("L", (40, 40), shade) for shade in (50, 60, 70)]
    frames[0].save(good / "stack.tif", save_all=True, append_images=frames[1:])

    def build():
        model_id = read_description(tiny_bundle).model_id
        return build_memory(str(good), str(tiny_bundle), model_id, STORAGE, str(tmp_path / "m"), "cpu", seed=0)

    line = build()
    assert line.startswith(
        "13 good images, 13 of them judged for the threshold, too few for one: give 19; left out: 2 "
    )
    assert sorted(line.partition("left out: ")[2].split(", ")) == [
        "1 empty",
        "1 hidden files or folders",
        "2 further pages",
        "2 not_an_image",
    ]
    monkeypatch.setattr(patch_memory, "MAX_IMAGES", 5)
    assert "1 or more after the first 5 images, which are enough" in build()
    monkeypatch.setattr(patch_memory, "MAX_IMAGES", 1)
    with pytest.raises(GladError, match="1 readable good images; at least two are needed, better 50; left out: 1 "):
        build()


def test_photos_of_one_piece_under_names_far_apart_are_said(tiny_bundle, tmp_path) -> None:
    rng = np.random.default_rng(0)
    names = rng.permutation(40).reshape(2, 20)
    for pair in names.T:
        piece = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for name in pair:
            piece.save(tmp_path / f"{name}.png")
    model_id, out = read_description(tiny_bundle).model_id, str(tmp_path / "memory")
    taken, doubt = build_memory(str(tmp_path), str(tiny_bundle), model_id, STORAGE, out, "cpu", seed=0).split("\n")
    assert taken == "40 good images, 40 of them judged for the threshold"
    one, other = re.match(r"\d+ of 40 good .*, such as (\d+).png and (\d+).png: copies, or ", doubt).groups()
    assert sorted((int(one), int(other))) in [sorted(pair) for pair in names.T.tolist()]


def test_another_bundle_than_the_jobs_is_refused(build) -> None:
    with pytest.raises(GladError, match="this job began with 0123456789abcdef"):
        build(model_id="0123456789abcdef")


@pytest.mark.parametrize("call", [0, 2, 3, 5])  # three batches of each view
def test_good_images_without_finite_features_are_named(call, build, photos, monkeypatch, tmp_path) -> None:
    real, calls = nearest.patch_features, []

    def overflows(model, images):
        patches = real(model, images).clone()
        if len(calls) == call:
            patches[-1, 0, 0] = float("nan")
        calls.append(len(images))
        return patches

    monkeypatch.setattr(nearest, "patch_features", overflows)
    monkeypatch.setattr(good_patches, "BATCH", 5)
    with pytest.raises(GladError, match=rf"not finite for 1 good images, such as \S*{photos}"):
        build()
    assert calls == [5, 5, 2, 5, 5, 2][: call + 1]
    assert not (tmp_path / "memory.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 100,
        save({"other": torch.zeros(2, 3)}),
        save({"good_patches.0": torch.zeros(2, 3)}),
        save({"good_patches.0": torch.zeros(3), "good": GOOD}),
        save({"good_patches.1": torch.zeros(2, 3), "good": GOOD}),
        save({"good_patches.0": torch.full((2, 3), np.nan), "good": GOOD}),
        save({"good_patches.0": torch.zeros(2, 3), "good": torch.zeros(0, 2)}),
        save({"good_patches.0": torch.zeros(2, 3), "good": torch.full((1, 2), np.nan)}),
        save({"good_patches.0": torch.zeros(2, 3), "good": GOOD, "threshold": torch.full((1,), np.inf)}),
        save({"good_patches.0": torch.zeros(2, 3), "good": GOOD, "threshold": torch.zeros(2)}),
        save(MEMORY | {"scores": torch.zeros(2, 2)}),
        save(MEMORY | {"scores": torch.tensor(1.0)}),
        save(MEMORY | {"scores": torch.tensor([np.nan])}),
    ],
)
def test_a_damaged_memory_is_one_line(content, tmp_path) -> None:
    file = tmp_path / "memory.safetensors"
    file.write_bytes(content)
    with pytest.raises(GladError, match=f"^{file}: damaged; give --overwrite"):
        read_memory(str(file), STORAGE)


def test_views_have_memories_and_standards_of_their_own(tiny_bundle, photos, tmp_path) -> None:
    description = read_description(tiny_bundle)
    settings = Settings.parse(description.settings, "").model_copy(update={"views": (View(), View(kind="tiles"))})
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    model_id = update_settings(bundle, settings, {})
    out = str(tmp_path / "memory")
    build_memory(str(photos), str(bundle), model_id, STORAGE, out, "cpu", seed=0)
    memory = read_memory(out, STORAGE)
    assert [kept.patches.shape[1] for kept in memory.patches] == [4 * 32] * 3
    whole, half, tiles = (len(kept.patches) for kept in memory.patches)
    assert half < whole < tiles  # photos of 40 x 36 and more are several tiles of 32 x 32
    standardised = memory.settings(settings)
    assert [(view.good_mean, view.good_spread) for view in standardised.views] == memory.good
    assert all(spread > 0 for _, spread in memory.good)
