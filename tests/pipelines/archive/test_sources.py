import io
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage, StorageError
from glad_core.errors import GladError
from pipelines.archive.fetch import fetch
from pipelines.archive.listing import MANIFEST_SCHEMA
from pipelines.archive.sources import list_source

STORAGE = Storage()


def tree(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def listed(source, category=None):
    return list(list_source(str(source), category, STORAGE))


def names(rows, root):
    return [row["uri"].removeprefix(f"{root}/") for row in rows]


def make_tar(path, members):
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def test_every_file_of_a_tree_is_listed_and_a_copied_tree_keeps_its_ids(tmp_path):
    here, there = (tree(tmp_path / name, "a/1.png", "b.jpg", "notes.txt", ".git/x") for name in ("here", "there"))
    rows = listed(here)
    assert names(rows, here) == ["a/1.png", "b.jpg", "notes.txt"]
    assert [row["size"] for row in rows] == [7, 5, 9]
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in listed(f"file://{there}")]
    assert len({row["image_id"] for row in rows}) == 3


def test_globs(tmp_path):
    root = tree(tmp_path, "a/1.png", "a/2.jpg", "a/deep/3.png", "b/4.png", "odd[1].png")
    assert names(listed(f"{root}/a/*.png"), root) == ["a/1.png"]
    assert names(listed(f"{root}/**/*.png"), root) == ["a/1.png", "a/deep/3.png", "b/4.png", "odd[1].png"]
    assert names(listed(f"{root}/?/[0-9].png"), root) == ["a/1.png", "b/4.png"]
    assert names(listed(f"{root}/odd[1].png"), root) == ["odd[1].png"]  # a file of that very name


def test_an_mvtec_category_gives_its_test_images_only(tmp_path):
    files = ["train/good/0.png", "test/good/0.png", "test/crack/0.png", "ground_truth/crack/0_mask.png"]
    root = tree(tmp_path, *[f"bottle/{name}" for name in files], "license.txt")
    rows = listed(root / "bottle")
    assert names(rows, root) == ["bottle/test/crack/0.png", "bottle/test/good/0.png"]
    assert {row["category"] for row in rows} == {"bottle"}
    assert listed(root) == listed(root, "bottle") == listed(root / "bottle", "bottle") == rows


def test_several_categories_need_a_choice_that_exists(tmp_path):
    root = tree(tmp_path, *[f"{c}/{s}/good/0.png" for c in ("bottle", "cable") for s in ("train", "test")])
    assert {row["category"] for row in listed(root, "cable")} == {"cable"}
    with pytest.raises(GladError, match=r"bottle, cable.*--category"):
        listed(root)
    with pytest.raises(GladError, match=r"no category 'botle'; did you mean 'bottle'"):
        listed(root, "botle")
    with pytest.raises(GladError, match="is the category 'bottle', not 'cable'"):
        listed(root / "bottle", "cable")
    with pytest.raises(GladError, match="no category in it"):
        listed(root / "bottle" / "test", "bottle")


def test_a_registry_s_category_names_the_images_of_any_folder(tmp_path):
    root = tree(tmp_path / "bottle", "left/0.png", "1.png")
    for category, expected in ((None, [None, "left"]), ("bottle", ["bottle"] * 2), ("cable", ["cable"] * 2)):
        rows = list_source(str(root), category, STORAGE, several=True)
        assert [row["category"] for row in rows] == expected
    both = tree(tmp_path / "both", *[f"{c}/{s}/good/0.png" for c in ("bottle", "cable") for s in ("train", "test")])
    rows = list(list_source(str(both), None, STORAGE, several=True))
    assert names(rows, both) == ["bottle/test/good/0.png", "cable/test/good/0.png"]
    assert [row["category"] for row in rows] == ["bottle", "cable"]


def test_lists_of_uris(tmp_path):
    root = tree(tmp_path, "a.png", "sub/b.png")
    (root / "list.txt").write_text(f"# ours\na.png\n\n  sub/b.png \n{root}/a.png\ns3://bucket/c d.png\n")
    assert [row["uri"] for row in listed(root / "list.txt")] == [
        f"{root}/a.png",
        f"{root}/sub/b.png",
        f"{root}/a.png",
        "s3://bucket/c d.png",
    ]
    pq.write_table(pa.table({"uri": ["a.png", None, "sub/b.png"], "n": [1, 2, 3]}), root / "list.parquet")
    assert names(listed(root / "list.parquet"), root) == ["a.png", "sub/b.png"]
    pq.write_table(pa.table({"path": ["a.png"]}), root / "wrong.parquet")
    with pytest.raises(GladError, match="string column 'uri'; it has path"):
        listed(root / "wrong.parquet")
    (root / "bad.parquet").write_bytes(b"no")
    with pytest.raises(GladError, match="not a readable Parquet"):
        listed(root / "bad.parquet")
    (root / "utf16.txt").write_text("ä.png", encoding="utf-16")
    with pytest.raises(GladError, match="UTF-8"):
        listed(root / "utf16.txt")


def test_only_a_tar_member_s_own_bytes_are_read(tmp_path):
    members = {"000.png": b"first", "000.json": b"{}", "sub/001.JPG": b"second!", "001.cls": b"1", "002.png": b""}
    make_tar(tmp_path / "shard-0.tar", members)
    make_tar(tmp_path / "shard-1.tar", {"000.png": b"other"})
    rows = listed(tmp_path)
    assert [fetch(STORAGE, row) for row in rows if row["size"]] == [b"first", b"second!", b"other"]
    assert rows[0]["uri"] == f"tar://000.png::{tmp_path}/shard-0.tar"
    assert len({row["image_id"] for row in rows}) == 4
    assert [row["uri"] for row in listed(tmp_path / "shard-1.tar")] == [rows[3]["uri"]]


@pytest.mark.parametrize("cut", [700, 1536 + 300])
def test_a_cut_off_shard_gives_its_readable_images_and_one_error(tmp_path, cut):
    whole = make_tar(tmp_path / "x.tar", {"0.png": b"a" * 600, "1.png": b"b" * 600}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:cut])
    rows = listed(tmp_path)
    good = [row for row in rows if "error_type" not in row]
    assert len(good) == (0 if cut < 1112 else 1)
    assert [row["error_type"] for row in rows if "error_type" in row] == ["damaged"]
    assert rows[-1]["stage"] == "list"


def test_a_file_that_is_no_tar_and_a_compressed_tar_are_error_rows(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar at all")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz"):
        pass
    messages = [row["message"] for row in listed(tmp_path)]
    assert len(messages) == 2
    assert "unpack it" in messages[1]


def test_a_source_that_does_not_exist_or_has_no_categories(tmp_path):
    with pytest.raises(StorageError, match="no such file or folder"):
        listed(tmp_path / "none")
    with pytest.raises(GladError, match="leave it out"):
        listed(tree(tmp_path, "x.png") / "x.png", "bottle")


def test_a_file_name_that_is_no_utf8_is_listed(tmp_path):
    with open(os.fsencode(tmp_path) + b"/bad\xff.png", "wb") as stream:
        stream.write(b"x")
    (row,) = listed(tmp_path)
    assert row["uri"].endswith("/bad%FF.png")
    assert fetch(STORAGE, row) == b"x"
    pa.Table.from_pylist([row], schema=MANIFEST_SCHEMA)
