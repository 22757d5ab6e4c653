"""Everything a folder of photos may hold: each file is judged or listed as an error with a reason; nothing stops."""

import io
import json
import os
import struct
import tarfile
import zlib

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipelines.archive.uris import path_of
from pipelines.cli.main import app

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
MANY = ("animated.gif", "animated.webp", "pages.tif", "torn_page.tif")
RNG = np.random.default_rng(11)


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
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        shard.addfile(link)
    return stream.getvalue()


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
    put("sizes/1x1.png", encoded(picture(1, 1)), True)
    put("sizes/1x20000.png", encoded(picture(1, 20_000)), None)
    put("sizes/20000x1.png", encoded(picture(20_000, 1)), None)
    put("sizes/bomb.png", bomb(), False)
    put("floats/nan.tif", tiff_of_floats(), None)
    for name in ("ü ß 日本.png", "new\nline.png", "quote'\".png", "x" * 200 + ".png", "a=b&c?d#e%20.png"):
        put(f"names/{name}", encoded(picture()), True)
    for folder in ("left", "right"):
        put(f"twice/{folder}/same.png", encoded(picture()), True)
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
    outcome = CliRunner().invoke(app, ["score", str(archive), "--model", str(tiny_bundle), "--out", str(out)])
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
    assert pages == {f"many/{name}#page={page}" for name in MANY for page in (2, 3)}
    assert f"{archive}/many/torn_page.tif#page=2" in bad
    assert counts["pages"] == len(pages)
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
