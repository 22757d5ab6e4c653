import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cluster.storage import Storage
from glad_core import adaptive
from glad_core.bundle.glad_json import update_settings, write_description
from glad_core.bundle.memory import PatchMemory, memory_tensors
from glad_core.bundle.model import load_bundle, save_derived
from glad_core.bundle.settings import Settings, View
from glad_core.doubt import doubt_about
from glad_core.engine import nearest
from glad_core.errors import GladError
from glad_core.images import to_tensor
from pipelines.archive.decode import DECODED_SCHEMA
from pipelines.models import registry
from pipelines.models.find import find_models
from pipelines.runs.schema import RESULTS_SCHEMA, SCORED_SCHEMA
from pipelines.score.actor import ActorSettings, GladActor

SIDE = 32


@pytest.fixture(scope="module")
def actor(tiny_bundle):
    return GladActor(settings(tiny_bundle))


def settings(bundle, **changed):
    values = {"seed": 0, "maps": "token", "reconstructions": False, "gpu": False, "threads": 1}
    models = find_models(str(bundle), Storage())
    return ActorSettings(models=models, storage=Storage(), **(values | changed))


def pixels(image_ids):
    return [
        np.random.default_rng(ord(image_id)).integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
        for image_id in image_ids
    ]


def rows(*image_ids, bad=()):
    def row(image_id):
        base = {"image_id": image_id, "uri": f"/{image_id}.png", "category": None, "position": ord(image_id)}
        if image_id in bad:
            return base | {"stage": "decode", "error_type": "damaged", "message": "torn"}
        return base | {"width": 40, "height": 36, "image": pixels(image_id)[0].tobytes()}

    return pa.Table.from_pylist([row(image_id) for image_id in image_ids], schema=DECODED_SCHEMA)


def by_id(table):
    return {row["image_id"]: row for row in table.to_pylist()}


def call(actor, *batches):
    """What Ray Data does: several batches in the actor at a time."""

    async def collect(batch):
        return [table async for table in actor(batch)]

    async def together():
        return await asyncio.gather(*(collect(batch) for batch in batches))

    found = [table for tables in asyncio.run(together()) for table in tables]
    assert len(found) == len(batches)
    return pa.concat_tables(found)


def test_every_row_comes_back_as_a_result_or_an_error(actor):
    table = call(actor, rows("a", "b", "c", bad="b"))
    assert table.schema.equals(SCORED_SCHEMA)
    out = by_id(table)
    assert set(out) == {"a", "b", "c"}
    assert (out["b"]["error_type"], out["b"]["message"], out["b"]["score"]) == ("damaged", "torn", None)
    a = out["a"]
    assert a["error_type"] is None
    assert a["category"] == "widget"
    assert {key: row["position"] for key, row in out.items()} == {key: ord(key) for key in "abc"}
    assert len(a["anomaly_map"]) == a["map_height"] * a["map_width"] == (SIDE // 8) ** 2
    assert a["is_anomalous"] == (a["score"] > a["threshold"])
    assert a["steps"][-1]["timestep"] == a["stop_step"]
    assert a["reconstruction"] is None


def test_a_bundle_may_judge_by_the_good_patches_in_it(tiny_bundle, tmp_path):
    model = load_bundle(tiny_bundle)
    memory, _ = nearest.remember(nearest.patch_features(model, to_tensor(pixels("ab"))).flatten(0, 1))
    chosen = model.settings.model_copy(update={"method": "nearest", "threshold": 0.01})
    path, known = tmp_path / "bundle", {"category": "widget", "provenance": {}}
    save_derived(path, tiny_bundle, replace(model, memory=[memory]), chosen, **known)
    out = by_id(call(GladActor(settings(path, reconstructions=True)), rows("a", "b", "c")))
    assert [out[key]["is_anomalous"] for key in "abc"] == [False, False, True]
    assert {(row["stop_reason"], row["stop_step"], row["reconstruction"]) for row in out.values()} == {
        ("none", None, None)
    }
    with pytest.raises(GladError, match=r"memory.safetensors: not the good patches of 2 views"):
        load_bundle(path, settings=chosen.model_copy(update={"views": (View(), View(kind="tiles"))}))
    for wrong in (memory.patches[:, 1:], torch.cat([memory.patches] * 2, dim=1)):
        width = wrong.shape[1]
        kept = PatchMemory(wrong, torch.zeros(width + 1, width))
        save_file(memory_tensors([kept]), path / "memory.safetensors")
        seal(path)
        with pytest.raises(GladError, match=rf"its good patches are {width} wide, its features 128: copy the bundle"):
            load_bundle(path)
    (path / "memory.safetensors").unlink()
    with pytest.raises(GladError, match=r"memory.safetensors is missing"):
        load_bundle(path)


def test_full_maps_and_reconstructions_on_request(actor, tiny_bundle):
    full = by_id(call(GladActor(settings(tiny_bundle, maps="full", reconstructions=True)), rows("a")))["a"]
    token = by_id(call(actor, rows("a")))["a"]
    assert (full["map_height"], full["map_width"]) == (SIDE, SIDE)
    assert full["score"] == token["score"]
    top = np.sort(np.asarray(full["anomaly_map"], np.float32))[-20:].mean()  # the bundle's K is 20
    assert top == pytest.approx(full["score"], abs=5e-3)  # the map is float16
    assert np.asarray(Image.open(io.BytesIO(full["reconstruction"]))).shape == (SIDE, SIDE, 3)


def test_neighbours_and_order_do_not_change_a_result(actor):
    together, alone = by_id(call(actor, rows(*"dcba"))), by_id(call(actor, rows("b")))
    for name in set(RESULTS_SCHEMA.names) - {"seconds", "score", "steps", "anomaly_map"}:
        assert together["b"][name] == alone["b"][name]
    assert together["b"]["score"] == pytest.approx(alone["b"]["score"], abs=1e-4)


def test_another_seed_gives_another_result(actor, tiny_bundle):
    other = GladActor(settings(tiny_bundle, seed=1))
    assert by_id(call(other, rows("a")))["a"]["score"] != by_id(call(actor, rows("a")))["a"]["score"]


def test_batches_in_flight_together_get_their_own_rows_back(actor):
    together = call(actor, rows("a", "b"), rows("c", bad="c"), rows("d"))
    assert sorted(by_id(together)) == list("abcd")
    assert by_id(together)["d"]["score"] == pytest.approx(by_id(call(actor, rows("d")))["d"]["score"], abs=1e-4)


def test_an_image_that_breaks_its_batch_is_the_only_one_lost(actor, monkeypatch):
    real = adaptive.encode
    broken = (np.frombuffer(rows("b")["image"][0].as_py(), np.uint8) / 127.5 - 1).reshape(SIDE, SIDE, 3)

    def breaks_on_b(model, images, noise):
        if any(np.allclose(image.permute(1, 2, 0).numpy(), broken, atol=1e-5) for image in images):
            raise RuntimeError("no\nluck")
        return real(model, images, noise)

    monkeypatch.setattr(adaptive, "encode", breaks_on_b)
    out = by_id(call(actor, rows(*"acbdefgh")))
    assert {key: row["stage"] for key, row in out.items() if row["stage"]} == {"b": "score"}
    assert (out["b"]["error_type"], out["b"]["message"]) == ("RuntimeError", "no luck")


def test_a_bundle_that_cannot_be_loaded_is_told_at_the_first_call(tiny_bundle, tmp_path):
    wishes = settings(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    shutil.rmtree(tmp_path / "bundle")
    actor = GladActor(wishes)
    with pytest.raises(GladError, match="no such model bundle"):
        call(actor, rows("a"))


def test_an_image_without_a_finite_score_is_an_error(actor, monkeypatch):
    real = adaptive.encode
    broken = np.frombuffer(rows("b")["image"][0].as_py(), np.uint8).reshape(SIDE, SIDE, 3) / 127.5 - 1

    def overflows_on_b(model, images, noise):
        latents = real(model, images, noise)
        latents[[np.allclose(image.permute(1, 2, 0).numpy(), broken, atol=1e-5) for image in images]] = float("inf")
        return latents

    before = by_id(call(actor, rows("a", "c")))
    monkeypatch.setattr(adaptive, "encode", overflows_on_b)
    out = by_id(call(actor, rows("a", "b", "c")))
    assert (out["b"]["stage"], out["b"]["error_type"]) == ("score", "not_finite")
    assert out["b"]["is_anomalous"] is out["b"]["score"] is None
    for neighbour in "ac":
        assert out[neighbour]["score"] == pytest.approx(before[neighbour]["score"], abs=1e-4)


def test_weights_that_overflow_give_errors_and_no_verdicts(tiny_bundle, tmp_path):
    """Finite on disk, but too large to compute with."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    file = bundle / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.weight"] *= 1e38
    save_file(weights, file)
    seal(bundle)
    out = by_id(call(GladActor(settings(bundle)), rows("a", "b")))
    assert {row["error_type"] for row in out.values()} == {"not_finite"}


def seal(bundle):
    """The checksums of changed files."""
    description = json.loads((bundle / "glad.json").read_text())
    write_description(bundle, description["settings"], description["category"], description["provenance"])


@pytest.mark.parametrize("registered", [False, True])
def test_a_bundle_that_was_replaced_stops_the_job(registered, tiny_bundle, tmp_path):
    """An actor that starts, or loads a category's bundle, when another model lies in its place."""
    home = tmp_path / "registry"
    version = registry.publish(tiny_bundle, str(home), "bolt", Storage())
    registry.promote(str(home), "bolt", version, Storage(), "test")
    bundle = home / "bolt" / version
    wishes = settings(home if registered else bundle)
    old = load_bundle(bundle).settings
    replaced_by = update_settings(bundle, old.model_copy(update={"threshold": 1.0}), {})
    table = rows("a").set_column(rows("a").schema.get_field_index("category"), "category", [["bolt"]])
    with pytest.raises(GladError, match=f"now holds model {replaced_by}, but this job began with {version}"):
        call(GladActor(wishes), table)


STARTED = """
import sys
from cluster.storage import Storage
from pipelines.score.actor import ActorSettings, GladActor
from pipelines.models.find import find_models

models = find_models(sys.argv[1], Storage())
actor = GladActor(
    ActorSettings(models, Storage(), seed=0, maps="token", reconstructions=False, gpu=False, threads=1)
)
assert actor.failure is None, actor.failure
print([name for name in ("transformers", "peft", "scipy") if name in sys.modules])
"""


def test_starts_without_what_it_does_not_need_also_beside_a_package_that_needs_it(tiny_bundle, tmp_path):
    # As peft: diffusers imports it where it finds it, and it imports transformers.
    for module in ("__init__.py", "tuners/__init__.py", "tuners/tuners_utils.py", "utils/__init__.py"):
        (tmp_path / "peft" / module).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "peft" / module).write_text("import transformers\nclass BaseTunerLayer: pass\n")
    (tmp_path / "peft-0.17.0.dist-info").mkdir()
    (tmp_path / "peft-0.17.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.17.0\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", STARTED, str(tiny_bundle)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def tiled(bundle, folder):
    """The bundle with two views, and decoded rows of pictures of several sizes for it."""
    shutil.copytree(bundle, folder)
    views = [{"kind": "squash", "good_mean": 0.1}, {"kind": "tiles", "scale": 0.5, "good_spread": 0.5}]
    model = load_bundle(folder)
    update_settings(folder, Settings.parse(model.settings.model_dump() | {"views": views}, ""), {})
    framings = load_bundle(folder).settings.framings()

    def row(image_id, height, width):
        pixels = np.random.default_rng(ord(image_id)).integers(0, 256, (height, width, 3)).astype(np.uint8)
        image = b"".join(framing.frame(pixels).tobytes() for framing in framings)
        base = {"image_id": image_id, "uri": f"/{image_id}.png", "position": ord(image_id)}
        return base | {"width": width, "height": height, "image": image}

    pictures = [row("a", 150, 90), row("b", 40, 200), row("c", 20, 20)]
    return [pa.Table.from_pylist([picture], schema=DECODED_SCHEMA) for picture in pictures]


def test_a_picture_of_several_views_and_tiles_is_one_result(tiny_bundle, tmp_path):
    tables = tiled(tiny_bundle, tmp_path / "tiled")
    actor = GladActor(settings(tmp_path / "tiled", reconstructions=True))
    together = by_id(call(actor, pa.concat_tables(tables)))
    assert all(row["error_type"] is None for row in together.values())
    a = together["a"]
    assert [tile["view"] for tile in a["tiles"]] == ["squash"] + ["tiles"] * 6
    # 75 x 45 pixels of the frame, of which the first is rounded up to the grid of tiles; 8 pixels a token
    assert (a["map_height"], a["map_width"]) == (10, 6)
    assert (a["full_height"], a["full_width"]) == (80, 48)
    # Other neighbours, another order and other batches: the same verdicts.
    apart = by_id(call(GladActor(settings(tmp_path / "tiled", slots=2, reconstructions=True)), *tables[::-1]))
    for image_id, row in together.items():
        assert row["score"] == pytest.approx(apart[image_id]["score"], abs=1e-4)
        stops = [(tile["stop_step"], tile["stop_reason"]) for tile in row["tiles"]]
        assert stops == [(tile["stop_step"], tile["stop_reason"]) for tile in apart[image_id]["tiles"]]


def test_what_the_model_was_not_made_for_is_said():
    usual = Settings(resolution=64, feature_resolution=64, white_level=4095, dark_level=500)
    row = {"height": 64, "width": 64, "peak": 3000.0}
    assert doubt_about(usual, row) is None
    assert doubt_about(usual, row | {"width": 100}) == "1.6 times longer than wide, seen as a square"
    assert doubt_about(usual, row | {"width": 100, "peak": None}) == "1.6 times longer than wide, seen as a square"
    assert "larger than the model sees" in doubt_about(usual, row | {"width": 300, "height": 290})
    assert doubt_about(usual, row | {"peak": 5000.0}) == "brighter than the white level"
    assert doubt_about(usual, row | {"peak": 40.0}) == "far darker than the training pictures"
    unleveled = usual.model_copy(update={"white_level": None, "dark_level": None})
    for peak, doubtful in ((4095.0, True), (40_000.0, False), (0.1, True), (0.9, False), (None, False)):
        assert ("no white level" in (doubt_about(unleveled, row | {"peak": peak}) or "")) is doubtful
    trained = usual.model_copy(update={"picture_size": (300, 900)})
    assert doubt_about(trained, row | {"height": 300, "width": 900}) is None
    tiled = usual.model_copy(update={"views": (View(), View(kind="tiles"))})
    assert doubt_about(tiled, row | {"height": 300, "width": 900}) is None
