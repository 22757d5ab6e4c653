import os

import numpy as np
import pyarrow as pa
import pytest
from conftest import encode, picture
from PIL import Image

from cluster.storage import Storage, StorageError
from glad_core.images import resize
from pipelines.archive import fetch as fetch_module
from pipelines.archive.decode import DECODED_SCHEMA, Reading, fetch_and_decode
from pipelines.archive.manifest import MANIFEST_SCHEMA


def test_the_stage_returns_every_row_and_never_raises(tmp_path, monkeypatch):
    good, empty, big = tmp_path / "good.png", tmp_path / "empty.png", tmp_path / "big.png"
    good.write_bytes(encode(Image.fromarray(picture())))
    empty.write_bytes(b"")
    big.write_bytes(b"x" * 2000)
    monkeypatch.setattr(fetch_module, "MAX_BYTES", 1500)
    files = [good, empty, big, tmp_path / "missing.png", tmp_path]
    rows = [{"image_id": str(n), "uri": str(file), "category": "c", "size": None} for n, file in enumerate(files)]
    lost = {"stage": "list", "error_type": "damaged", "message": "m"}
    rows.append({"image_id": "9", "uri": "broken.tar", "size": 5, **lost})
    rows = [row | {"position": position} for position, row in enumerate(rows)]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    out = fetch_and_decode(Storage(), lambda category: 16)(table)
    assert out.schema == DECODED_SCHEMA
    assert out["error_type"].to_pylist() == [None, "empty", "too_large", "missing", "missing", "damaged"]
    assert out["stage"].to_pylist() == [None, "fetch", "fetch", "fetch", "fetch", "list"]
    first = out.to_pylist()[0]
    assert (first["width"], first["height"]) == (40, 24)
    assert out["position"].to_pylist() == list(range(6))
    expected = resize(picture(), 16)
    assert (np.frombuffer(first["image"], np.uint8).reshape(16, 16, 3) == expected).all()


def test_an_image_is_blamed_only_if_another_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for file in files:
        file.write_bytes(encode(Image.fromarray(picture())))
    rows = [
        {"image_id": str(n), "uri": str(file), "category": "c", "size": file.stat().st_size, "position": n}
        for n, file in enumerate(files)
    ]
    table, far = pa.Table.from_pylist(rows[:5], schema=MANIFEST_SCHEMA), rows[5]
    forbidden, asked = set(), []

    def opens(path, flags):
        asked.append(path)
        if path in forbidden:
            raise PermissionError(13, "Permission denied", path)
        return os.open(path, flags)

    monkeypatch.setattr("cluster.local._at_once", opens)
    stage = fetch_and_decode(Storage(), lambda category: 16, Reading(str(tmp_path)), lambda: [far])
    forbidden.add(str(files[2]))
    assert stage(table)["error_type"].to_pylist() == [None, None, "unreadable", None, None]
    assert str(files[5]) not in asked  # one at hand was enough
    forbidden |= {str(file) for file in files[:5]}
    assert stage(table)["error_type"].to_pylist() == ["unreadable"] * 5  # a folder of another owner
    forbidden.add(str(files[5]))
    with pytest.raises(StorageError, match="permission denied"):
        stage(table)
    forbidden.clear()
    for file in files:
        file.unlink()
    with pytest.raises(StorageError, match="gone or empty"):
        stage(table)


def test_every_row_knows_how_many_pages_its_shard_has(tmp_path):
    pages = [Image.fromarray(np.full((8, 8), 40 * number, np.uint8)) for number in range(1, 4)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    pages[0].save(tmp_path / "b.png")
    names = ("a.tiff", "b.png")
    rows = [{"image_id": f"{n:032x}", "uri": str(tmp_path / name), "position": n} for n, name in enumerate(names)]
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    out = fetch_and_decode(Storage(), lambda category: 8)(table)
    assert out["further"].to_pylist() == [False, True, True, False]
    assert out["shard_pages"].to_pylist() == [2] * 4
    assert out["position"].to_pylist() == [0, 0, 0, 1]
    first = fetch_and_decode(Storage(), lambda category: 8, Reading(pages="first"))(table)
    assert first["shard_pages"].to_pylist() == [0, 0]
    assert (out["unjudged"].to_pylist(), first["unjudged"].to_pylist()) == ([0] * 4, [2, 0])


def test_previews_and_thumbnails_are_counted(tmp_path):
    frames = [Image.fromarray(picture()) for _ in range(3)]
    frames[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=frames[1:])
    frames = [Image.fromarray(picture()) for _ in range(3)]
    frames[1].encoderinfo = {"tiffinfo": {254: 1}}
    frames[0].save(tmp_path / "b.tif", save_all=True, append_images=frames[1:])
    rows = [{"image_id": name, "uri": str(tmp_path / name), "position": 0} for name in ("a.jpg", "b.tif")]
    out = fetch_and_decode(Storage(), lambda category: 8)(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    assert out["error_type"].null_count == 3
    assert out["further"].to_pylist() == [False, False, True]
    assert out["unjudged"].to_pylist() == [2, 1, 0]
