"""The door for Python gives the numbers of `glad score`, for every way to hand a picture over."""

import asyncio
import io
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from drawn_pictures import one_picture
from PIL import Image

import glad_core
from cluster.storage import Storage
from glad_core.bundle.glad_json import update_settings
from glad_core.bundle.model import load_bundle
from glad_core.bundle.settings import Settings
from glad_core.errors import GladError
from glad_core.scoring import full_size_map, resize_map
from pipelines import pretrained
from pipelines.archive.decode import Reading, fetch_and_decode
from pipelines.models.find import find_models
from pipelines.score.actor import ActorSettings, GladActor

WHITE = 4095
GOOD_SCORES = np.linspace(0, 8, 41).astype(np.float32).tolist()
VIEWS = {
    "squash": [{"kind": "squash"}],
    "fit": [{"kind": "fit"}],
    "several": [{"kind": "squash", "good_mean": 0.1}, {"kind": "tiles", "scale": 0.5, "good_spread": 0.5}],
}


@pytest.fixture(scope="module", params=VIEWS)
def bundle(request, tiny_bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / request.param
    shutil.copytree(tiny_bundle, folder)
    changed = load_bundle(folder).settings.model_dump() | {"views": VIEWS[request.param], "white_level": float(WHITE)}
    update_settings(folder, Settings.parse(changed, ""), {"good_scores": {"": GOOD_SCORES}})
    return folder


@pytest.fixture(scope="module")
def detector(bundle):
    return glad_core.Detector.from_pretrained(bundle)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(1).integers(0, 256, (60, 90, 3)).astype(np.uint8)
    written = one_picture(pixels, WHITE)
    chosen = [name for name in written if name.partition(".")[0] in ("plain", "clear", "turned", "deep", "pages")]
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    for name in chosen:
        (folder / name).write_bytes(written[name])
    return sorted(folder.iterdir())


def scored(bundle, files):
    """The rows of `glad score --pages first`, by its own stages."""
    models = find_models(str(bundle), Storage())
    framings = models.settings()[""].framings()
    decode = fetch_and_decode(Storage(), lambda category: framings, Reading(pages="first"))
    manifest = [{"image_id": str(i), "uri": str(f), "category": None, "position": i} for i, f in enumerate(files)]
    settings = ActorSettings(models, Storage(), 0, "token", reconstructions=True, gpu=0, threads=1)

    async def judge(table):
        return [part async for part in GladActor(settings)(table)]

    rows = asyncio.run(judge(decode(pa.Table.from_pylist(manifest))))[0].to_pylist()
    return sorted(rows, key=lambda row: row["position"])


def test_it_gives_the_numbers_of_a_run(bundle, detector, files):
    rows, verdicts = scored(bundle, files), detector(map(str, files))
    assert len(rows) == len(verdicts) > 8
    settings = detector.model.settings
    for row, verdict in zip(rows, verdicts, strict=True):
        assert row["error_type"] is None, row
        assert (verdict.name, verdict.category, verdict.model_id) == (row["uri"], row["category"], row["model_id"])
        assert verdict.score == pytest.approx(row["score"], abs=1e-4)
        assert np.float32(verdict.threshold) == row["threshold"]
        assert (verdict.stop_step, verdict.stop_reason) == (row["stop_step"], row["stop_reason"])
        assert verdict.is_anomalous == row["is_anomalous"]
        assert verdict.p_value == pytest.approx(row["p_value"])
        assert 1 / 42 <= verdict.p_value == (1 + sum(good >= row["score"] for good in GOOD_SCORES)) / 42
        assert verdict.image.shape == (row["height"], row["width"], 3) == (*verdict.map.shape, 3)
        further = "the first of 2 pages; the others were not judged"
        expected = [further] * verdict.name.endswith("pages.tif") + [row["doubt"]] * bool(row["doubt"])
        assert verdict.doubt == ("; ".join(expected) or None)
        with Image.open(io.BytesIO(row["reconstruction"])) as stored:
            assert np.abs(np.asarray(stored).astype(int) - verdict.reconstruction).max() <= 1
        tokens = np.array(row["anomaly_map"], np.float32).reshape(row["map_height"], row["map_width"])
        full = (row["full_height"], row["full_width"])
        whole = resize_map(full_size_map(torch.from_numpy(tokens)[None], settings, full), verdict.map.shape)[0]
        assert np.allclose(verdict.map, whole, atol=2e-3)


def test_a_picture_is_the_same_as_file_image_or_array(detector, files):
    by_name = {file.name: file for file in files}
    plain = detector(by_name["plain.png"])
    with Image.open(by_name["plain.png"]) as image, Image.open(by_name["turned.png"]) as turned:
        given = [image, turned, plain.image, np.dstack([plain.image, plain.image[..., :1]])]
        given.append(np.round(plain.image * (WHITE / 255)).astype(np.uint16))
        given.append(np.asfortranarray(plain.image))
        for verdict in detector(given):
            assert np.array_equal(verdict.image, plain.image)
            assert verdict.score == pytest.approx(plain.score, abs=1e-4)
    grey = detector([by_name["grey.png"], plain.image[..., 0], plain.image[..., :1]])
    assert len({round(verdict.score, 4) for verdict in grey}) == 1
    assert detector([]) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/nowhere.png", "/nowhere.png: No such file or directory; give the path of one picture, or a list"),
        ("/", "/: Is a directory; give the path of one picture, or a list of them"),
        ("s3://bucket/x.png", "only files of this machine are read here"),
        (__file__, "not PNG, JPEG, BMP, TIFF"),
        (b"\x89PNG", "expected a path, a PIL image or an array of numbers, got bytes"),
        (None, "got NoneType"),
        (np.zeros((2, 8, 8, 3), np.uint8), r"got \[2, 8, 8, 3\]; of several give a list"),
        (np.zeros((3, 8, 8), np.uint8), r"got \[3, 8, 8\]"),
        (np.zeros((0, 8, 3), np.uint8), "got ndarray"),
        (np.ones((8, 8), bool), "got ndarray"),
        (np.full((8, 8), np.nan), "picture 0: grey values outside"),
        (np.full((8, 8), -1, np.int16), "picture 0: grey values outside"),
        (np.full((8, 8), -1, np.int8), "give uint8"),
        ([np.zeros((8, 8), np.uint8), "/nowhere.png"], "/nowhere.png: No such file"),
    ],
)
def test_what_is_no_picture_is_one_line(tiny_bundle, given, message):
    with pytest.raises(GladError, match=message) as refusal:
        glad_core.Detector.from_pretrained(tiny_bundle)(given)
    assert "\n" not in str(refusal.value)


def test_pillow_s_half_of_16_bit_colours_is_refused(detector, files):
    deep = next(file for file in files if file.name == "deep.png")
    with Image.open(deep) as image, pytest.raises(GladError, match="keeps 8 of this picture's 16 bits; give its path"):
        detector(image)


def test_bundles_are_named_as_on_the_command_line(tmp_path, tiny_bundle, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = glad_core.Detector.from_pretrained("small")
    assert "the demo's, trained on drawn circuit boards" in repr(small)
    assert repr(pretrained("small")) == repr(small)
    assert "for widget" in repr(pretrained(str(tiny_bundle)))
    with pytest.raises(GladError, match=r"use pipelines.pretrained\('s3://b/board'\)"):
        glad_core.Detector.from_pretrained("s3://b/board")
    with pytest.raises(GladError, match="no such model bundle"):
        glad_core.Detector.from_pretrained(tmp_path / "none")


def test_a_verdict_is_shown_beside_its_picture(detector, files, tmp_path):
    verdict = detector(files[0])
    verdict.show(tmp_path / "verdict.png")
    with Image.open(tmp_path / "verdict.png") as image:
        assert image.width > image.height
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, glad_core, pipelines; glad_core.__version__; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"
