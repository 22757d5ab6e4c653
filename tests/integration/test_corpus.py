"""Everything a folder of photos may hold: each file is judged or listed as an error with a reason; nothing stops."""

import io
import json
import os
import re
import shutil
import struct
import tarfile
import zlib

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from drawn_pictures import one_grey_picture, one_picture, png_of_16_bits, tiff
from PIL import Image
from typer.testing import CliRunner

from cluster.storage import Storage
from glad_core.bundle.glad_json import update_settings
from glad_core.bundle.model import load_bundle
from glad_core.errors import GladError
from pipelines.archive.decode import UNJUDGED
from pipelines.archive.layouts import read_dataset
from pipelines.archive.listing import count_outside
from pipelines.archive.pieces import Archive
from pipelines.archive.rows import LeftOut
from pipelines.archive.sources import list_source
from pipelines.archive.uris import path_of
from pipelines.cli.main import app
from pipelines.evaluate.masks import read_mask

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
MANY = ("animated.gif", "animated.webp", "pages.tif", "torn_page.tif")
RNG = np.random.default_rng(11)
STORAGE = Storage()
WHITE, DARK = 4095, 1000  # levels of the bundle


def picture(width=48, height=40, mode="RGB"):
    small = Image.fromarray(RNG.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def tiff_of_floats():
    values = np.full((16, 16), np.nan, np.float32)
    return encoded(Image.fromarray(values, mode="F"), "TIFF")


def bomb():
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def tar_with_traversal():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for name in ("../../escaped.png", "/etc/absolute.png", "inside.png"):
            data = encoded(picture())
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
        for name in ("._inside.png", "__MACOSX/._inside.png", "inside.json"):
            shard.addfile(tarfile.TarInfo(name), io.BytesIO())
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    return stream.getvalue()


def alike(put):
    """One picture in every writing, and those that the bundle's levels do not fit."""
    for name, data in one_picture(np.asarray(picture()), WHITE).items():
        put(f"same/{name}", data, True)
    for name, data in one_grey_picture(np.asarray(picture(mode="L")), WHITE).items():
        put(f"same_grey/{name}", data, True)
    for name, peak in (("brighter", WHITE + 300), ("darker", DARK - 50)):
        put(f"levels/{name}.png", png_of_16_bits(np.linspace(0, peak, 4800).reshape(40, 40, 3).round()), True)
    put("kinds/complex.tif", tiff(np.ones((9, 9), complex)), False)
    spectral = tiff(np.ones((9, 9, 7), np.uint16), photometric="minisblack", planarconfig="contig")
    put("kinds/spectral.tif", spectral, False)


def corpus(root):
    """Writes the files; returns {path: whether it can be judged}, None where either is right."""
    made = {}

    def put(name, data, good):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        made[str(path)] = good

    for kind, suffix in (("PNG", "png"), ("JPEG", "jpg"), ("BMP", "bmp"), ("TIFF", "tif"), ("WEBP", "webp")):
        for number in range(5):
            whole = encoded(picture(), kind)
            put(f"whole/{kind}{number}.{suffix}", whole, True)
            for quarter in (1, 2, 3):
                put(f"torn/{kind}{number}.{quarter}.{suffix}", whole[: len(whole) * quarter // 4], False)
        put(f"wrong_suffix/{kind}.{'jpg' if suffix == 'png' else 'png'}", encoded(picture(), kind), True)
        put(f"header/{kind}.{suffix}", encoded(picture(), kind)[:16], False)
        put(f"zero/{kind}.{suffix}", b"", False)
        put(f"noise/{kind}.{suffix}", RNG.bytes(300), False)
        put(f"text/{kind}.{suffix}", b"<html>404</html>", False)
    for mode, kind, suffix in (
        ("CMYK", "JPEG", "jpg"),
        ("1", "PNG", "png"),
        ("L", "PNG", "png"),
        ("LA", "PNG", "png"),
        ("P", "PNG", "png"),
        ("RGBA", "PNG", "png"),
        ("I;16", "PNG", "png"),
    ):
        image = Image.fromarray(RNG.integers(0, 65536, (40, 48)).astype(np.uint16)) if mode == "I;16" else None
        put(f"modes/{mode.replace(';', '')}.{suffix}", encoded(image or picture(mode=mode), kind), True)
    palette = picture(mode="P")
    put("modes/palette_alpha.png", encoded(palette, transparency=3), True)
    put("alpha/zero.png", encoded(Image.merge("RGBA", [*picture().split(), Image.new("L", (48, 40), 0)])), True)
    for suffix in ("jfif", "jpe", "JPEG"):
        put(f"names/camera.{suffix}", encoded(picture(), "JPEG"), True)
    put("unread/phone.heic", b"\0\0\0\x18ftypheic" + RNG.bytes(300), False)
    frames = [picture() for _ in range(3)]
    put("many/animated.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), True)
    put("many/animated.webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), True)
    put("many/pages.tif", encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:]), True)
    torn = bytearray(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:], compression="tiff_lzw"))
    with Image.open(io.BytesIO(torn)) as opened:
        opened.seek(1)
        start = opened.tag_v2[273][0]
    torn[start : start + 500] = bytes(500)
    put("many/torn_page.tif", bytes(torn), True)
    thumbnail = picture(12, 10)
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    put("many/thumbnail.tif", encoded(frames[0], "TIFF", save_all=True, append_images=[thumbnail]), True)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        put(f"exif/{turn}.jpg", encoded(picture(), "JPEG", exif=exif), True)
    alike(put)
    put("sizes/1x1.png", encoded(picture(1, 1)), True)
    put("sizes/1x20000.png", encoded(picture(1, 20_000)), None)
    put("sizes/20000x1.png", encoded(picture(20_000, 1)), None)
    put("sizes/bomb.png", bomb(), False)
    put("floats/nan.tif", tiff_of_floats(), None)
    for name in ("ü ß 日本.png", "new\nline.png", "quote'\".png", "x" * 200 + ".png", "a=b&c?d#e%20.png"):
        put(f"names/{name}", encoded(picture()), True)
    for folder in ("left", "right"):
        put(f"twice/{folder}/same.png", encoded(picture()), True)
    for name in ("hidden/._a.png", "hidden/.a.png", "hidden/Thumbs.db", "hidden/.git/a.png", "hidden/__MACOSX/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(picture()))
    for name in ("train/Good/a.png", "Test/ok/a.png", "val/good/a.png", "ground_truth/cut/a_mask.png", "loose.png"):
        put(f"dataset/{name}", encoded(picture()), True)  # a category beside other folders hides nothing
    put("lists/list.csv", b"uri\na.png\n", False)
    put("lists/labels.json", b"{}", False)
    outside = root.parent / "outside"
    outside.mkdir()
    (outside / "linked.png").write_bytes(encoded(picture()))
    (root / "linked_folder").symlink_to(outside)
    made[str(root / "linked_folder/linked.png")] = True
    (root / "broken_link.png").symlink_to(root / "nowhere.png")
    made[str(root / "broken_link.png")] = False
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    return made


def test_every_file_ends_in_exactly_one_place(tmp_path, tiny_bundle):
    archive = tmp_path / "archive"
    archive.mkdir()
    made = corpus(archive)
    assert len(made) >= 150
    (archive / "shard.tar").write_bytes(tar_with_traversal())
    out = tmp_path / "out"
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    settings = load_bundle(bundle).settings.model_copy(update={"white_level": WHITE, "dark_level": DARK})
    update_settings(bundle, settings, {})
    outcome = CliRunner().invoke(app, ["score", *map(str, (archive, "--model", bundle, "--out", out, "--actors", 1))])
    assert outcome.exit_code == 0, outcome.output

    judged = pq.read_table(out / "results").to_pylist()
    lost = pq.read_table(out / "errors").to_pylist()
    counts = json.loads((out / "run.json").read_text())["counts"]
    ids = [row["image_id"] for row in judged + lost]
    assert len(ids) == len(set(ids)) == counts["images"] + counts["pages"]
    good = {path_of(row["uri"]) if row["uri"].startswith("file:") else row["uri"] for row in judged}
    bad = {row["uri"]: row for row in lost}
    assert f"{archive}/names/new\nline.png" not in {row["uri"] for row in judged}  # a URI is one line
    assert bad.keys() >= {f"{archive}/pipe.png"}
    for path, expected in made.items():
        assert (path in good) != (path in bad), path
        if expected is not None:
            assert (path in good) is expected, (path, bad.get(path))
    # Every page is judged: two further ones of each file of three, but no thumbnail.
    pages = {path.removeprefix(f"{archive}/") for path in good | bad.keys() if "#page=" in path}
    assert pages == {f"many/{name}#page={page}" for name in MANY for page in (2, 3)} | {"same/pages.tif#page=2"}
    assert f"{archive}/many/torn_page.tif#page=2" in bad
    assert counts["pages"] == len(pages)
    assert counts["left_out"][UNJUDGED] == 1  # the thumbnail
    # One picture has one verdict, however it is written.
    for folder in ("same", "same_grey"):
        scores = [row["score"] for row in judged if f"/{folder}/" in row["uri"]]
        assert len(scores) > 30
        assert np.ptp(scores) <= 1e-3 * np.mean(scores), folder
    doubts = {row["uri"].rpartition("/")[2]: row["doubt"] for row in judged if "/levels/" in row["uri"]}
    assert doubts == {
        "brighter.png": "brighter than the white level",
        "darker.png": "far darker than the training pictures",
    }
    kinds = {row["uri"]: row["error_type"] for row in lost if "/kinds/" in row["uri"]}
    assert list(kinds.values()) == ["unsupported"] * 2
    # What has no row is counted: in the folder hidden/ five, two and a json file in the tar.
    left_out = {"hidden files or folders": 7, "files in tars that are no images": 1}
    assert counts["left_out"].items() >= left_out.items()
    assert "left out" in outcome.stdout
    for row in lost:
        assert row["stage"] in ("list", "fetch", "decode", "score")
        assert row["message"].strip()
        assert "\n" not in row["message"]
    assert all(np.isfinite(row["score"]) for row in judged)
    # Members are read where they lie in the shard; no name of theirs is ever a path.
    members = {uri for uri in good | bad.keys() if uri.startswith("tar://")}
    assert len(members) == 4
    assert any(uri.startswith("tar://link.png::") for uri in bad)  # it leads out of the tar
    assert not (tmp_path.parent / "escaped.png").exists()
    kinds = {path.removeprefix(str(archive)).split("/")[1] for path in made}
    assert len(kinds) >= 13


MARK = np.zeros((40, 48), np.uint8)
MARK[4:14, 6:20] = 1


def mask_corpus():
    """Masks with the same 140 pixels as people and programs write them: {name: bytes}, and whether they are lossy."""
    grey = Image.fromarray(MARK * 255)
    palette = Image.fromarray(MARK * 5)
    palette.putpalette([value for label in range(6) for value in (label * 40, 0, 99 if label else 0)])
    swapped = Image.fromarray(1 - MARK)
    swapped.putpalette([255, 255, 255, 0, 0, 0])
    rgba = Image.merge("RGBA", [grey, grey, grey, Image.new("L", grey.size, 255)])
    sixteen, wide = Image.fromarray(MARK.astype(np.uint16) * 3), Image.fromarray(MARK.astype(np.int32) * 70_000)
    jpeg = encoded(grey, "JPEG", quality=85)
    again = encoded(Image.open(io.BytesIO(jpeg)))
    smooth = encoded(grey.resize((480, 400)).resize(grey.size, Image.Resampling.LANCZOS))
    exact = {
        "ones_mask.png": encoded(Image.fromarray(MARK)),
        "bits-mask.png": encoded(grey.convert("1")),
        "mask_sixteen.png": encoded(sixteen),
        "wide_gt.tif": encoded(wide, "TIFF"),
        "palette.png": encoded(palette),
        "swapped_label.gif": encoded(swapped, "GIF"),
        "rgba.png.png": encoded(rgba),
        "alpha_MASK.png": encoded(Image.merge("LA", [Image.new("L", grey.size), grey])),
        "folder/000.png": encoded(grey),
        "two_mask_1.png": encoded(Image.fromarray(MARK * (np.arange(48) < 10).astype(np.uint8))),
        "two_mask_2.png": encoded(Image.fromarray(MARK * (np.arange(48) >= 10).astype(np.uint8))),
    }
    lossy = {"jpeg.jpg": jpeg, "again_mask.png": again, "smooth_seg.png": smooth}
    return exact, lossy


@pytest.mark.parametrize("test", ["test", "Test", "test_public"])
def test_every_mask_marks_the_same_pixels(test, tmp_path):
    root = tmp_path / "set/part"
    truth = root / ("test_public/ground_truth" if test == "test_public" else "Ground-Truth")
    exact, lossy = mask_corpus()
    names = {name.split("/")[0].split(".")[0] for name in exact | lossy}
    names = {re.sub("[_-](mask|gt|label|seg)(_.)?$|^mask_", "", name, flags=re.IGNORECASE) for name in names}
    for path in ("train/good/a.png", f"{test}/Normal/a.png", *(f"{test}/cut/{name}.png" for name in names)):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encoded(picture()))
    for name, data in (exact | lossy | {"ones.json": b"{}", "ones.xml": b"<a/>"}).items():
        (truth / "cut" / name).parent.mkdir(parents=True, exist_ok=True)
        (truth / "cut" / name).write_bytes(data)
    examples = read_dataset(str(tmp_path / "set"), STORAGE)
    defects = {example.path.rpartition("/")[2][:-4]: example for example in examples if example.anomalous}
    assert defects.keys() == names
    for name, example in defects.items():
        mask = read_mask(example, STORAGE, examples)
        assert (mask.marked != MARK).sum() == 0, name
        assert bool(mask.doubts) == (name in ("jpeg", "again", "smooth")), name
    left_out = LeftOut()
    rows = list(list_source(str(tmp_path / "set"), None, STORAGE, left_out=left_out))
    assert len(rows) == len(names) + 1
    files = sum(path.is_file() for path in root.rglob("*"))
    assert files == len(rows) + sum(left_out.others.values()) + count_outside(
        Archive(str(tmp_path / "set"), None, STORAGE, False)
    )


def test_lists_of_every_kind_name_the_same_images(tmp_path):
    for name in ("a, b.png", "c.png"):
        (tmp_path / name).write_bytes(encoded(picture()))
    plain = '#made by hand\nuri;category\n"a, b.png";nut\nc.png;bolt\n'
    frame = pd.DataFrame({"uri": ["a, b.png", "c.png"], "category": ["nut", "bolt"]})
    (tmp_path / "1.csv").write_text(plain)
    (tmp_path / "2.csv").write_bytes(plain.replace(";", ",").replace("\n", "\r\n").encode("utf-16"))
    frame.to_csv(tmp_path / "3.tsv", sep="\t")
    (tmp_path / "4.txt").write_bytes("uri\n# x\na, b.png\n\nc.png\n".encode("utf-16"))
    frame.to_parquet(tmp_path / "5.parquet")
    frame.astype("category").rename(columns=str.upper).to_parquet(tmp_path / "6.parquet")
    for name in ("1.csv", "2.csv", "3.tsv", "4.txt", "5.parquet", "6.parquet"):
        rows = list(list_source(str(tmp_path / name), "part" if name == "4.txt" else None, STORAGE, several=True))
        assert [path_of(row["uri"]) for row in rows] == [f"{tmp_path}/a, b.png", f"{tmp_path}/c.png"], name
        assert [row["category"] for row in rows] == (["part"] * 2 if name == "4.txt" else ["nut", "bolt"]), name
    with pytest.raises(GladError, match="nothing says of which category"):  # it would be "tmp"
        list(list_source(str(tmp_path / "4.txt"), None, STORAGE, several=True))
    (tmp_path / "lines/bolt/1").mkdir(parents=True)
    (tmp_path / "c.png").rename(tmp_path / "lines/bolt/1/c.png")
    (row,) = list_source(f"{tmp_path}/lines/**/*.png", None, STORAGE, several=True)
    assert row["category"] == "bolt"
