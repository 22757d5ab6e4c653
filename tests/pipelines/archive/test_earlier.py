"""A further listing holds what is new, once, and counts what it leaves out."""

import os
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import photo

from cluster.storage import Storage
from pipelines.archive import earlier
from pipelines.archive.earlier import BEING_WRITTEN, CHANGED, Earlier, key_of
from pipelines.archive.listing import write_manifest
from pipelines.archive.manifest import MANIFEST_SCHEMA, read_earlier, read_manifest
from pipelines.archive.pieces import Archive

STORAGE = Storage()
LONG_AGO = time.time() - 3600


class Grower:
    """An archive that is listed again and again, each time without what earlier listings have."""

    def __init__(self, source, folder):
        self.archive, self.folder, self.listings = Archive(str(source), None, STORAGE, False), folder, []

    def __call__(self):
        """Names of what is new, and the counts of this listing."""
        out = str(self.folder / str(len(self.listings)))
        before = read_earlier(self.listings, STORAGE) if self.listings else None
        counts, _ = write_manifest(self.archive, None, 0, out, before)
        self.listings.append((out, [counts.rows]))
        rows = read_manifest(out, [counts.rows], 0, counts.rows, STORAGE).to_pylist() if counts.rows else []
        return sorted(row["uri"].rpartition("/")[2] for row in rows), counts


def old(path: Path, content: bytes = b"x") -> Path:
    path.write_bytes(content)
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(earlier, "SETTLED", 0)


def test_only_what_has_come_since_is_listed_and_changes_are_counted(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    grow = Grower(source, tmp_path)
    for name in ("a.png", "c.png"):
        old(source / name)
    assert grow()[0] == ["a.png", "c.png"]
    assert grow() == ([], grow()[1])
    old(source / "b.png")
    old(source / "c.png", b"another")
    names, counts = grow()
    assert names == ["b.png"]
    assert (counts.judged, counts.others[CHANGED]) == (2, 1)
    (source / "a.png").unlink()
    names, counts = grow()
    assert (names, counts.judged, counts.others[CHANGED]) == ([], 2, 1)


def test_every_image_is_known_again_also_one_whose_key_ends_in_zeros():
    table = pa.Table.from_pylist([{"uri": f"/a/{index}.png"} for index in range(2000)], schema=MANIFEST_SCHEMA)
    keys = [key_of(row) for row in table.to_pylist()]
    assert any(key.endswith(b"\0") for key in keys)
    earlier_ones = Earlier.of(table)
    assert all(earlier_ones.get(key) is not None for key in keys)
    assert earlier_ones.get(key_of({"uri": "/a/2000.png"})) is None


def test_a_list_that_grows_in_another_spelling_names_nothing_new(tmp_path):
    source = tmp_path / "list.txt"
    grow = Grower(source, tmp_path)
    source.write_text("a.png\n")
    assert grow()[0] == ["a.png"]
    source.write_text(f"./a.png\n{tmp_path}/a.png\nb.png\n./b.png\n")
    names, counts = grow()
    assert (names, counts.judged, counts.duplicates) == (["b.png"], 1, 2)


def test_a_tar_that_grows_gives_its_new_members_alone(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    grow = Grower(source, tmp_path)
    for count in (2, 3):
        with tarfile.open(source / "t.tar", "w") as tar:
            for index in range(count):
                tar.add(photo(index, tmp_path / f"{index}.png"), arcname=f"{index}.png")
        os.utime(source / "t.tar", (LONG_AGO + count, LONG_AGO + count))
        names, counts = grow()
    assert names == ["t.tar"]
    assert (counts.judged, counts.others[CHANGED]) == (2, 2)  # their tar is another file


@pytest.mark.parametrize("kind", ["grows", "goes", "broken", "empty", "half a tar"])
def test_a_young_file_that_is_not_whole_is_left_for_the_next_time(tmp_path, kind, monkeypatch):
    source = tmp_path / "photos"
    source.mkdir()
    grow = Grower(source, tmp_path)
    photo(0, source / "first.png")
    grow()
    whole = photo(1, tmp_path / "whole.png").read_bytes()
    photo(2, source / "new.png")
    late = source / ("late.tar" if kind == "half a tar" else "late.png")
    late.write_bytes({"broken": whole[:-20], "empty": b"", "half a tar": whole}.get(kind, whole))
    if kind in ("grows", "goes"):
        happens = {"grows": lambda _: late.write_bytes(whole + b"x"), "goes": lambda _: late.unlink()}
        monkeypatch.setattr(earlier.time, "sleep", happens[kind])
    names, counts = grow()
    assert (names, counts.others[BEING_WRITTEN]) == (["new.png"], 1)
    monkeypatch.undo()
    if kind != "goes":
        os.utime(old(late, whole), (LONG_AGO, LONG_AGO))
        assert grow()[0] == [late.name]


def test_young_files_of_a_clock_that_is_ahead_are_not_left_out_for_ever(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    grow = Grower(source, tmp_path)
    old(source / "a.png")
    grow()
    os.utime(old(source / "b.png"), (time.time() + 7200,) * 2)
    assert grow()[0] == ["b.png"]
