import errno
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cluster import s3_listing
from cluster.storage import Storage, StorageError, absolute, join, local_path


@pytest.fixture
def storage():
    return Storage()


def test_a_storage_travels_with_its_settings_and_keeps_its_secrets():
    storage = Storage("http://somewhere:1", "the-id", "the-secret", region="here")
    copy = pickle.loads(pickle.dumps(storage.patient()))
    assert isinstance(copy, Storage)
    assert copy == storage.patient() != storage
    assert hash(copy) == hash(storage.patient())
    assert "the-secret" not in repr(copy)


def test_walk_is_ordered_and_leaves_out_what_is_no_image_source(storage, tmp_path):
    for name in ("b/2.png", "b/1.png", "a.png", ".hidden/x.png", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    assert list(storage.walk(str(tmp_path))) == [("a.png", 5), ("b/1.png", 5), ("b/2.png", 5), ("dangling.png", 0)]


def test_read_ranges_write_and_kinds(storage, tmp_path):
    uri = f"file://{tmp_path}/sub/a%20b.bin"
    storage.write(uri, b"0123456789")
    assert (tmp_path / "sub" / "a b.bin").read_bytes() == b"0123456789"
    assert storage.read(uri) == b"0123456789"
    assert storage.read(uri, 3, 4) == b"3456"
    assert storage.size(uri) == 10
    assert [storage.kind(str(tmp_path / name)) for name in ("sub", "sub/a b.bin", "none")] == ["folder", "file", "none"]
    assert storage.folders(str(tmp_path)) == ["sub"]
    storage.delete_folder(str(tmp_path / "sub"))
    storage.delete_folder(str(tmp_path / "sub"))
    assert os.listdir(tmp_path) == []


def test_mistakes_are_one_clear_line(storage, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for attempt, words in (
        (lambda: storage.resolve("gs://bucket/x"), "unknown kind of location"),
        (lambda: storage.resolve("s3://"), "names no bucket"),
        (lambda: list(storage.walk(str(tmp_path / "none"))), "no such file or folder"),
        (lambda: storage.write(str(tmp_path / "file" / "x"), b""), "a file is in the way"),
    ):
        with pytest.raises(StorageError, match=words) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_an_endpoint_nobody_answers_is_named(tmp_path):
    nobody = Storage("http://127.0.0.1:9", "id", "secret", region="us-east-1")
    with pytest.raises(StorageError, match=r"cannot reach http://127.0.0.1:9"):
        nobody.kind("s3://bucket/x")


@pytest.mark.parametrize(
    ("location", "spelling"),
    [
        ("/data/images/", "/data/images"),
        ("/data//images/../images", "/data/images"),
        ("/", "/"),
        ("file:///data/a%20b/", "/data/a b"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/x/", "s3://bucket/x"),
        ("s3://bucket//x/", "s3://bucket//x"),  # on S3 an empty name within a key is a name
        ("s3:///bucket/x//", "s3://bucket/x"),
    ],
)
def test_every_location_has_one_spelling(location, spelling):
    assert absolute(location) == spelling
    assert absolute(spelling) == spelling


def test_a_location_is_relative_to_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute("images/") == str(tmp_path / "images")
    assert absolute("~/images/") == str(tmp_path / "home" / "images")


@pytest.mark.parametrize(
    ("location", "words"), [("s3://", "names no bucket"), ("s3:///", "names no bucket"), ("gs://b/x", "unknown kind")]
)
def test_a_location_that_cannot_be_used_is_an_error(location, words):
    with pytest.raises(StorageError, match=words) as error:
        absolute(location)
    assert str(error.value).startswith(location)


def test_absolute_alone_strips_the_slashes_of_locations():
    """Two spellings of one location once made a run read nothing: `absolute` is the only one that makes them."""
    by_hand = re.compile(r"rstrip\(.{1,3}/.{1,3}\)\s+if\s+is_s3|if\s+is_s3\([^)]*\)\s+else\s+(\w+\.)?local_path")
    root = Path(__file__).parents[2]
    files = [file for package in ("cluster", "pipelines") for file in sorted((root / package).rglob("*.py"))]
    assert len(files) > 50
    assert [str(file.relative_to(root)) for file in files if by_hand.search(file.read_text())] == []


def test_joined_names():
    assert join("s3://b/k/", "x", "y") == "s3://b/k/x/y"
    assert join("/", "x") == "/x"


def test_local_paths():
    assert local_path("file:///a%20b/c") == "/a b/c"
    assert local_path("~/x") == os.path.expanduser("~/x")


def test_a_full_disk_is_the_target_s_fault_and_everything_else_the_source_s(storage, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    storage.fetch(str(tmp_path / "a"), tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "a"
    failures: list[OSError] = [OSError("AWS Error ACCESS_DENIED"), OSError(errno.ENOSPC, "No space left on device")]

    def fails(source, target):
        raise failures.pop(0)

    monkeypatch.setattr(shutil, "copyfile", fails)
    with pytest.raises(StorageError, match=r"/a: AWS Error ACCESS_DENIED"):
        storage.fetch(str(tmp_path / "a"), tmp_path / "copy")
    with pytest.raises(OSError, match="No space"):
        storage.fetch(str(tmp_path / "a"), tmp_path / "copy")


@pytest.mark.parametrize("location", ["file://host/x.png", "file://relative.png", "/x\0.png", "s3://b/x\0", "://x", ""])
def test_what_names_no_path_of_this_machine_is_refused(location):
    with pytest.raises(StorageError) as error:
        absolute(location)
    assert str(error.value).isprintable()


def test_a_file_uri_holds_any_byte_and_no_query():
    assert local_path("file:///a%FF%23#b?c") == "/a\udcff##b?c"
    assert local_path("file://localhost/x") == "/x"
    assert absolute("/data/a:/s3:/x") == "/data/a:/s3:/x"
    assert absolute("s3+url://bucket/a%0A%25.png") == "s3://bucket/a\n%.png"


def test_what_no_key_can_name_is_said(storage, monkeypatch):
    listed = [("a.png", 1, '"1"'), ("a.png/", 2, '"2"'), (".hidden/b.png", 3, '"3"'), ("c//d.png", 4, '"4"')]
    monkeypatch.setattr(s3_listing, "keys", lambda *_, **__: iter(listed))
    entries = list(storage.entries("s3://bucket/x", prefix="x/"))
    assert [entry.path for entry in entries] == ["x/a.png", "x/a.png/", "x/c//d.png"]
    assert [entry.problem is None for entry in entries] == [True, False, True]
    inside = list(storage.entries("s3://bucket/x/.old", prefix=".old/", hidden=True))
    assert {entry.problem for entry in inside} == {"hidden"}  # whatever hides the folder that is listed


def test_links_to_folders_are_followed_only_in_archives(storage, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("1")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "loop").symlink_to(tmp_path / "here")
    assert list(storage.walk(str(tmp_path / "here"))) == []  # a sweep must not delete what others own
    assert list(storage.walk(str(tmp_path / "here"), follow=True)) == [("link/x", 1)]
    assert [entry.path for entry in storage.entries(str(tmp_path / "here"))] == ["link/x", "loop"]


def test_a_deep_tree_is_walked(storage, tmp_path):
    subprocess.run(["mkdir", "-p", f"{tmp_path}/{'a/' * 1200}"], check=True)  # deeper than Python's stack
    assert list(storage.entries(str(tmp_path))) == []
    (tmp_path / "a" / "x").write_text("")
    assert [entry.path for entry in storage.entries(str(tmp_path))] == ["a/x"]
    subprocess.run(["rm", "-r", f"{tmp_path}/a"], check=True)
