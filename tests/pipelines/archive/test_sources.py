import io
import os
import tarfile

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.storage import Storage, StorageError
from glad_core.errors import GladError
from pipelines.archive.fetch import fetch
from pipelines.archive.listing import count_outside, write_manifest
from pipelines.archive.manifest import MANIFEST_SCHEMA
from pipelines.archive.pieces import Archive, split
from pipelines.archive.rows import LeftOut
from pipelines.archive.sources import advice_on, list_source

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
    (root / "utf16.txt").write_bytes("ä.png".encode("utf-16")[:-1])
    with pytest.raises(GladError, match="no text in UTF-8 or UTF-16"):
        listed(root / "utf16.txt")


def test_an_odd_entry_of_a_list_is_one_error_row(tmp_path):
    root = tree(tmp_path, "a.png")
    make_tar(root / "t.tar", {"m.png": b"member"})
    with open(os.fsencode(root) + b"/\xff.png", "wb") as stream:
        stream.write(b"bytes")
    odd = ["s3://b\0/x.png", "file://host/x.png", "http://x/y.png", "://x.png", "x" * 10**6, "tar://no::t.tar"]
    odd += ["tar://m.png::none.tar", "tar://m.png", "s3://"]
    good = ["a.png", "tar://m.png::t.tar", f"file://{root}/%FF.png"]
    pq.write_table(pa.table({"uri": pa.array([*odd, *good], pa.large_string())}), root / "list.parquet")
    for name, lines in (("list.parquet", None), ("list.txt", "\n".join([*odd, *good]).encode())):
        if lines is not None:
            (root / name).write_bytes(lines + b"\n\xff.png\n\xfe.png\n")
        rows = listed(root / name)
        assert all(row["stage"] == "list" and row["message"].isprintable() for row in rows[: len(odd)])
        assert len({row["image_id"] for row in rows}) == len({row["uri"] for row in rows}) + (lines is not None)
        read = [fetch(STORAGE, row) for row in rows[len(odd) :] if "error_type" not in row]
        assert read == [b"a.png", b"member", b"bytes"] + ([b"bytes"] if lines else [])
    assert rows[-1]["error_type"] == "missing"  # not UTF-8, and no file of that name
    table = pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA)
    assert table["uri"].to_pylist()[-1] == "%FE.png"


def test_bytes_that_are_no_utf8_in_a_parquet_list_spoil_only_their_entry(tmp_path):
    tree(tmp_path, "ab")
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0\4\0\0\0")
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"\xff\xfeab")])
    pq.write_table(pa.table({"uri": bad}), tmp_path / "list.parquet")
    left_out = LeftOut()
    rows = list(list_source(str(tmp_path / "list.parquet"), None, STORAGE, left_out=left_out))
    assert [row.get("error_type") for row in rows] == ["missing", None]
    assert left_out.blank == 1


def test_every_uri_of_a_tree_with_odd_names_leads_back_to_the_same_bytes_and_is_unique(tmp_path):
    root = tmp_path / "archive"
    root.mkdir()
    names = [b"\xff\xfe.png", rb"\xff\xfe.png", b"%FF%FE.png", b"a\nb.png", b"sp.png ", b"sp.png", b"a.tar::x.png"]
    names += [b"caf\xc3\xa9.png", b"cafe\xcc\x81.png", b"#?.png", b"tar:", b"~x", b"d\xff/1.png"]
    os.mkdir(os.fsencode(root) + b"/d\xff")
    for name in names:
        with open(os.fsencode(root) + b"/" + name, "wb") as stream:
            stream.write(b"bytes of " + name)
    make_tar(root / "a.tar", {"x.png": b"1", "::y.png": b"2", "\udcff.png": b"3", "\\xff.png": b"4", "z\n.png": b"5"})
    rows = listed(root)
    contents = [fetch(STORAGE, row) for row in rows]
    assert sorted(contents) == sorted([b"bytes of " + name for name in names] + [b"1", b"2", b"3", b"4", b"5"])
    assert len({row["image_id"] for row in rows}) == len({row["uri"] for row in rows}) == len(rows)
    uris = [row["uri"] for row in rows]
    (tmp_path / "again.txt").write_text("\n".join(uris))
    pq.write_table(pa.table({"uri": uris}), tmp_path / "again.parquet")
    for name in ("again.txt", "again.parquet"):
        again = listed(tmp_path / name)
        assert [row["uri"] for row in again] == uris
        assert [fetch(STORAGE, row) for row in again] == contents


def test_what_is_no_file_or_cannot_be_listed_is_an_error_row_and_links_are_followed_without_circles(
    tmp_path, monkeypatch
):
    root = tree(tmp_path / "archive", "a/1.png", "closed/2.png")
    os.mkfifo(root / "pipe.png")
    (root / "a" / "up").symlink_to(root)
    (root / "self.png").symlink_to("self.png")
    tree(tmp_path / "elsewhere", "3.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    rows = listed(root)
    assert names(rows, root) == ["a/1.png", "a/up", "closed", "linked/3.png", "pipe.png", "self.png"]
    errors = {name: row["message"] for name, row in zip(names(rows, root), rows, strict=True) if "error_type" in row}
    assert list(errors) == ["a/up", "closed", "pipe.png"]
    assert "permission denied" in errors["closed"]
    assert [row["message"] for row in listed(f"{root}/**/2.png")] == [errors["closed"]]  # it may hold one
    assert names(listed(f"{root}/a/*.png"), root) == ["a/1.png"]  # it may not


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


def sources(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def found(source, category=None, several=False):
    left_out = LeftOut()
    rows = list(list_source(str(source), category, STORAGE, several, left_out))
    return rows, left_out


def test_a_folder_with_train_and_test_hides_nothing_beside_it(tmp_path):
    sources(tmp_path, "a/train/good/1.png", "a/test/good/2.png", "b/3.png", "4.png", "c/Thumbs.db")
    rows, left_out = found(tmp_path)
    assert sorted(names(rows, tmp_path)) == ["4.png", "a/test/good/2.png", "a/train/good/1.png", "b/3.png"]
    assert left_out.others == {"hidden files or folders": 1}
    assert advice_on(str(tmp_path), "a", STORAGE) is None
    advice = advice_on(str(tmp_path), None, STORAGE) or ""
    assert advice.startswith(f"{tmp_path}: every file is scored, since other folders lie beside")
    assert "--category a scores" in advice
    assert advice_on(str(tmp_path / "a"), None, STORAGE) is None
    chosen, _ = found(tmp_path, "a")
    assert names(chosen, tmp_path) == ["a/test/good/2.png"]


def test_files_outside_of_a_test_set_are_counted(tmp_path):
    sources(tmp_path, "a/train/good/1.png", "a/test/good/2.png", "a/val/3.png", "a/readme.txt")
    assert names(found(tmp_path / "a")[0], tmp_path) == ["a/test/good/2.png"]
    assert count_outside(Archive(str(tmp_path / "a"), None, STORAGE, False)) == 3
    assert count_outside(Archive(str(tmp_path / "a/val"), None, STORAGE, False)) == 0
    sources(tmp_path, "b/train/good/1.png", "b/test/good/2.png", "loose.png", ".DS_Store")
    assert count_outside(Archive(str(tmp_path), "b", STORAGE, False)) == 7
    assert count_outside(Archive(str(tmp_path), None, STORAGE, True)) == 6
    split_file = "object,split,label,image,mask\nx,test,normal,loose.png,\nx,train,normal,a/val/3.png,\n"
    (tmp_path / "1cls.csv").write_text(split_file)
    assert count_outside(Archive(str(tmp_path), None, STORAGE, False)) == 8  # the split file, and all but loose.png


def test_hidden_files_are_counted_and_make_no_archive_of_a_dataset(tmp_path):
    root, out = tmp_path / "set", str(tmp_path / "manifest")
    sources(root, "a/train/1.png", "a/test/good/2.png", "a/test/.x/3.png", "a/test/good/._2.png", ".cache/4.png")
    rows, left_out = found(root)
    assert names(rows, root) == ["a/test/good/2.png"]
    assert left_out.others == {"hidden files or folders": 2}
    counts, _ = write_manifest(Archive(str(root), None, STORAGE, False), None, 0, out)
    (piece,) = split(Archive(str(root), None, STORAGE, False))
    pieced, _ = write_manifest(Archive(str(root), None, STORAGE, False), piece, 1, out)
    assert counts == pieced
    _, globbed = found(f"{root}/a/**/*.png")
    assert globbed.others == {"hidden files or folders": 1}


def test_what_a_tar_holds_beside_images_is_counted(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("1.png", "1.json", "1.cls", "._1.png", "__MACOSX/._1.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    rows, left_out = found(tmp_path / "x.tar")
    assert len(rows) == 1
    assert left_out.others == {"files in tars that are no images": 2, "hidden files or folders": 2}


LISTS = {
    "pandas.parquet": lambda path: pd.DataFrame({"uri": ["a.png", None], "category": ["nut", "nut"]}).to_parquet(path),
    "categories.parquet": lambda path: (
        pd.DataFrame({"uri": ["a.png"], "category": ["nut"]}).astype("category").to_parquet(path)
    ),
    "large.parquet": lambda path: pq.write_table(
        pa.table({"uri": pa.array(["a.png"], pa.large_string()), "category": pa.array(["nut"], pa.string_view())}), path
    ),
    "polars.parquet": lambda path: pl.DataFrame({"uri": ["a.png"], "category": ["nut"]}).write_parquet(path),
    "commas.csv": lambda path: path.write_text("uri,category\na.png,nut\n,\n"),
    "tabs.tsv": lambda path: path.write_text("uri\tcategory\na.png\tnut\n"),
    "separator.csv": lambda path: path.write_text("sep=;\nuri ; category\na.png ; nut\n"),
    "comment.csv": lambda path: path.write_text(
        "# from a camera, uri and all\n\nuri,category\n#x.png,nut\na.png,nut\n"
    ),
    "hash.csv": lambda path: path.write_text("#uri,category\na.png,nut\n"),
    "note.csv": lambda path: path.write_text('uri,category,note,note\na.png,nut,"two\nlines","5"\n'),
    "blanks.csv": lambda path: path.write_text('"uri" , "category"\n"a.png" , "nut" \n'),
    "capitals.parquet": lambda path: pl.DataFrame({"URI": ["a.png"], "Category ": ["nut"]}).write_parquet(path),
    "csv.txt": lambda path: path.write_text("# x\nURI\tcategory\na.png\tnut\n"),
    "excel.CSV": lambda path: path.write_bytes('Category; URI\r\nnut; "a.png"\r\n'.encode("utf-16")),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_every_kind_name_images_and_categories(name, tmp_path):
    LISTS[name](tmp_path / name)
    rows, _ = found(tmp_path / name, several=True)
    assert [(row["uri"], row["category"]) for row in rows] == [(f"{tmp_path}/a.png", "nut")]


def test_comments_of_a_list_are_counted_and_other_csv_files_refused(tmp_path):
    (tmp_path / "list.txt").write_text("# photos\na.png\n#b.png\n")
    rows, left_out = found(tmp_path / "list.txt")
    assert (len(rows), left_out.others) == (1, {"comments of the list": 2})
    (tmp_path / "other.csv").write_text("name,score\na,1\n")
    with pytest.raises(GladError, match="needs a column 'uri' in its first line; it has name, score"):
        found(tmp_path / "other.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uri,URI\na.png,b.png\n", "has the column 'uri' 2 times"),
        ("uri,category,Category\na.png,1,2\n", "has the column 'category' 2 times"),
        ('uri\na.png\n"b.png\nc.png\n', "line 3: a quote is open"),  # c.png would vanish
        ('uri\n\n"a.png\nb.png"\n', "line 3: a quote is open"),
        ('uri,note\na.png,"6 inch\nb.png,\n', "line 2: a quote is open"),
        ('# a list\nuri\n"a"b.png\n', "line 3: a quote is open"),
        ("uri\na,b.png\n", "line 2 has 2 cells for 1 columns"),
        ("path\na.png\n", "needs a column 'uri'"),
        ("", "needs a column 'uri'"),
    ],
)
def test_a_csv_list_that_would_lose_an_image_is_refused(text, message, tmp_path):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(GladError, match=message):
        found(tmp_path / "list.csv")


def test_a_parquet_list_with_two_columns_for_one_is_refused(tmp_path):
    for names in (["uri", "URI"], ["uri", "uri"]):
        pq.write_table(pa.table([["a.png"], ["b.png"]], names=names), tmp_path / "list.parquet")
        with pytest.raises(GladError, match="has the column 'uri' 2 times"):
            found(tmp_path / "list.parquet")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_list_may_have_a_header_and_excel_s_encoding(encoding, tmp_path):
    text = "URI\nä,1.png\r\nuri\n"  # a file may be called so
    for mark in ("", "\ufeff") if encoding[-3:] in ("-le", "-be") else ("",):
        (tmp_path / "list.txt").write_bytes((mark + text).encode(encoding))
        rows, left_out = found(tmp_path / "list.txt")
        assert names(rows, tmp_path) == ["ä,1.png", "uri"]
        assert left_out.others == {"header of the list": 1}
        (tmp_path / "list.csv").write_bytes((mark + text.replace(",", ";")).encode(encoding))
        assert names(found(tmp_path / "list.csv")[0], tmp_path) == ["ä;1.png", "uri"]


def test_a_column_of_row_numbers_is_no_category_and_numbers_may_be_categories(tmp_path):
    pd.DataFrame({"uri": ["a.png"]}).to_csv(tmp_path / "index.csv")
    assert [row["category"] for row in found(tmp_path / "index.csv")[0]] == [None]
    pd.DataFrame({"uri": ["a.png"], "category": [0]}).to_parquet(tmp_path / "numbers.parquet")
    assert [row["category"] for row in found(tmp_path / "numbers.parquet", several=True)[0]] == ["0"]
    pd.DataFrame({"uri": ["a.png", "b.png"], "category": [7, None]}).to_parquet(tmp_path / "floats.parquet")
    assert [row["category"] for row in found(tmp_path / "floats.parquet")[0]] == ["7", None]
    pd.DataFrame({"uri": ["007.png"], "category": [0.5]}).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(GladError, match="the column 'category' holds no names, but double"):
        found(tmp_path / "scores.parquet")


@pytest.mark.parametrize("name", ["list.jsonl", "list.csv.gz", "LIST.XLSX", "list.pq"])
def test_a_list_in_another_format_is_no_broken_picture(name, tmp_path):
    sources(tmp_path, name)
    with pytest.raises(GladError, match="not read; write the list as text, CSV or Parquet"):
        found(tmp_path / name)


def test_one_rule_gives_categories(tmp_path):
    sources(tmp_path, "lines/nut/1/a.png", "lines/bolt/b.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/lines/nut/1/a.png\n")
    with pytest.raises(GladError, match=r"nothing says of which category .*a.png is: add a column 'category'"):
        found(tmp_path / "list.txt", several=True)
    assert [row["category"] for row in found(tmp_path / "list.txt", "nut", several=True)[0]] == ["nut"]
    globbed, _ = found(f"{tmp_path}/lines/**/*.png", several=True)
    assert sorted(row["category"] for row in globbed) == ["bolt", "nut"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("./nut/a.png"), io.BytesIO())  # as `tar cf x.tar .` writes it
    assert [row["category"] for row in found(tmp_path / "x.tar", several=True)[0]] == ["nut"]
