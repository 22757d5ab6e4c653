"""The manifest is that of one walk through the archive, however it is cut into pieces."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from cluster.storage import Storage
from glad_core.errors import GladError
from pipelines.archive import listing, manifest, pieces
from pipelines.archive.listing import count_repeated, write_manifest
from pipelines.archive.manifest import MANIFEST_SCHEMA, read_manifest
from pipelines.archive.pieces import Archive, split
from pipelines.archive.sources import list_source

STORAGE = Storage()
NAMES = st.sampled_from(["a", "a-b", "a.d", "b", "ü", "Z", "0"])


def listed(archive, folder):
    """List every piece by itself, the last one first; returns the rows of each piece, and the duplicates."""
    pieces = list(enumerate(split(archive)))
    counts = {number: write_manifest(archive, piece, number, str(folder)) for number, piece in reversed(pieces)}
    assert count_repeated(*[ids for _, ids in counts.values()]) == 0
    return [counts[number][0].rows for number, _ in pieces], sum(count.duplicates for count, _ in counts.values())


def read(folder, counts, *stretch):
    return read_manifest(str(folder), counts, *(stretch or (0, sum(counts))), STORAGE)


@given(
    files=st.sets(st.lists(NAMES, min_size=1, max_size=4).map("/".join), min_size=1, max_size=40),
    folders=st.integers(1, 9),
    loose=st.integers(1, 5),
    several=st.booleans(),
)
@hypothesis_settings(max_examples=40, deadline=None)
def test_pieces_together_are_one_walk_with_positions(tmp_path_factory, files, folders, loose, several):
    root, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in files:
        file = root / f"{name}.png"  # next to a folder of that name without suffix
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pieces, "FOLDERS", folders)
        patched.setattr(pieces, "LOOSE_FILES", loose)
        patched.setattr(manifest, "PART_ROWS", 4)
        archive = Archive(str(root), None, STORAGE, several)
        counts, duplicates = listed(archive, out)
        table = read(out, counts)
        middle = read(out, counts, sum(counts) // 3, sum(counts) - sum(counts) // 4)
    assert len(counts) <= folders
    assert duplicates == 0
    rows = list(list_source(str(root), None, STORAGE, several))
    assert [row["uri"] for row in table.to_pylist()] == [row["uri"] for row in rows]
    assert [row["image_id"] for row in table.to_pylist()] == [row["image_id"] for row in rows]
    assert [row["category"] for row in table.to_pylist()] == [row["category"] for row in rows]
    assert table["position"].to_pylist() == list(range(len(files)))
    assert middle.equals(table.slice(sum(counts) // 3, len(middle)))


def test_a_wide_tree_becomes_many_pieces_and_a_flat_folder_stays_one(tmp_path, monkeypatch):
    for folder in range(200):
        (tmp_path / "wide" / f"{folder:03d}").mkdir(parents=True)
        (tmp_path / "wide" / f"{folder:03d}" / "0.png").write_bytes(b"x")
    wide = split(Archive(str(tmp_path), None, STORAGE, False))
    assert len(wide) == 50  # of four folders each
    assert all(len(piece) == 4 for piece in wide)
    monkeypatch.setattr(pieces, "LOOSE_FILES", 3)
    (tmp_path / "flat").mkdir()
    for number in range(5):
        (tmp_path / "flat" / f"{number}.png").write_bytes(b"x")
    (piece,) = split(Archive(str(tmp_path / "flat"), None, STORAGE, False))
    assert [part[1:3] for part in piece] == [("", None)]


def test_a_list_is_in_parts_without_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "PART_ROWS", 3)
    (tmp_path / "list.txt").write_text("".join(f"{n % 7}.png\n" for n in range(10)))
    out = tmp_path / "manifest"
    assert listed(Archive(str(tmp_path / "list.txt"), None, STORAGE, False), out) == ([7], 3)
    assert [pq.read_metadata(part).num_rows for part in sorted(out.iterdir())] == [3, 3, 1]
    assert pq.read_table(out).schema.equals(MANIFEST_SCHEMA)


def test_a_name_twice_in_one_tar_is_a_duplicate_and_in_two_tars_is_not(tmp_path):
    for shard in ("0.tar", "1.tar"):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name in ("a.png", "b.png", "a.png"):
                member = tarfile.TarInfo(name)
                member.size = 4
                tar.addfile(member, io.BytesIO(b"data"))
    assert listed(Archive(str(tmp_path), None, STORAGE, False), tmp_path / "manifest") == ([4], 2)


def test_the_manifest_holds_the_version_of_every_file_that_was_listed(tmp_path):
    root = tmp_path / "archive"
    root.mkdir()
    (root / "1.png").write_bytes(b"x")
    with tarfile.open(root / "0.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.png"), io.BytesIO())
    versions = [str((root / name).stat().st_mtime_ns) for name in ("0.tar", "1.png")]
    counts, _ = listed(Archive(str(root), None, STORAGE, False), tmp_path / "manifest")
    assert read(tmp_path / "manifest", counts)["version"].to_pylist() == versions
    (root / "list.txt").write_text("0.tar\n1.png\n")  # of an image in a list only its name is known
    counts, _ = listed(Archive(str(root / "list.txt"), None, STORAGE, False), tmp_path / "list")
    assert read(tmp_path / "list", counts)["version"].to_pylist() == [versions[0], None]
    (single,) = list_source(str(root / "1.png"), None, STORAGE)
    assert single["version"] == versions[1]


def test_a_manifest_of_an_earlier_release_is_read(tmp_path):
    table = pa.Table.from_pylist([{"image_id": "0" * 32, "position": 0}], schema=MANIFEST_SCHEMA)
    pq.write_table(table.drop_columns("version"), tmp_path / "part-00000000.parquet")
    assert read(tmp_path, [1]).schema.equals(MANIFEST_SCHEMA)
    assert read(tmp_path, [1])["version"].to_pylist() == [None]


def test_ids_that_come_twice_are_counted_across_tasks():
    ids = np.frombuffer(bytes(range(64)), "S16")
    assert count_repeated(ids[:2], ids[2:]) == 0
    assert count_repeated(ids[:3], ids[2:], ids[:1]) == 2
    almost = np.frombuffer(bytes(8) + bytes(8) + bytes(8) + b"\1" * 8, "S16")  # the first halves are equal
    assert count_repeated(almost) == 0


def test_blank_entries_and_repeated_members_are_counted(tmp_path):
    pq.write_table(pa.table({"uri": ["a.png", None, "", " ", "a.png"]}), tmp_path / "list.parquet")
    (counts, _) = write_manifest(
        Archive(str(tmp_path / "list.parquet"), None, STORAGE, False), None, 0, str(tmp_path / "manifest")
    )
    assert counts[:3] == (1, 1, 3)


def test_an_image_that_a_list_names_in_two_spellings_is_listed_once(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("m.png"), io.BytesIO())
    spellings = ["a.png", "./a.png", "sub/../a.png", f"{tmp_path}/a.png", f"file://{tmp_path}/a.png", "b.png"]
    spellings += ["t.tar", "tar://m.png::t.tar", "s3://b/a.png", "s3://b//a.png"]
    (tmp_path / "list.txt").write_text("\n".join(spellings))
    counts, _ = write_manifest(
        Archive(str(tmp_path / "list.txt"), None, STORAGE, False), None, 0, str(tmp_path / "manifest")
    )
    uris = read(tmp_path / "manifest", [counts.rows])["uri"].to_pylist()
    assert uris == [f"{tmp_path}/a.png", f"{tmp_path}/b.png", f"tar://m.png::{tmp_path}/t.tar", *spellings[-2:]]
    assert counts.duplicates == 5


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(GladError, match="no images in it"):
        listing.list_remotely(str(tmp_path / "empty"), None, STORAGE, str(tmp_path / "manifest"), False)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_an_archive_of_unknown_categories_is_refused_and_a_part_of_it_is_not(tmp_path, capsys):
    def listed_for(known):
        return listing.list_remotely(str(root), None, STORAGE, str(tmp_path / "manifest"), True, known)

    root = tmp_path / "archive"
    for name in ("1.png", "nut/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    with pytest.raises(GladError, match=r"no image is of a category that --model knows \(bolt, pin\)"):
        listed_for(["bolt", "pin"])
    assert sum(listed_for(["bolt", "nut"]).rows) == 2
    assert capsys.readouterr().err == ""
    for name in ("train", "test"):
        (root / "part" / name).mkdir(parents=True)
    listed_for(["bolt", "nut"])
    assert "--category part scores the test images of one" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"PAR1", "half", "of other rows"])
def test_a_damaged_manifest_is_one_line(tmp_path, content):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"x")
    counts, _ = listed(Archive(str(tmp_path), None, STORAGE, False), tmp_path / "manifest")
    (part,) = (tmp_path / "manifest").iterdir()
    data = part.read_bytes()
    if content == "of other rows":
        pq.write_table(pq.read_table(part).slice(1), part)
    else:
        part.write_bytes(data[: len(data) // 2] if content == "half" else content)
    with pytest.raises(GladError, match=r"part-00000000.parquet: damaged; give --overwrite"):
        read(tmp_path / "manifest", counts)
