import errno
import os
import pickle
import threading

import pytest

from cluster.storage import Storage, StorageError, explain, join, local_path


@pytest.fixture
def storage():
    return Storage()


def test_settings_come_from_the_environment_and_secrets_stay_out_of_the_repr(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    assert Storage.from_environment() == Storage()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://somewhere:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    found = Storage.from_environment()
    assert (found.endpoint, found.access_key, found.secret_key) == ("http://somewhere:1", "the-id", "the-secret")
    assert "the-secret" not in repr(found)
    assert pickle.loads(pickle.dumps(found)) == found


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


def test_create_has_exactly_one_winner(storage, tmp_path):
    wins = []
    start = threading.Barrier(8)

    def attempt(number):
        start.wait()
        if storage.create(str(tmp_path / "claim"), str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert (tmp_path / "claim").read_text() == str(wins[0])


def test_a_file_system_without_hard_links_is_named(storage, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        storage.create(f"{tmp_path}/started.json", b"{}")
    assert not list(tmp_path.iterdir())


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


def test_explain_knows_the_words_of_s3():
    storage = Storage("http://e")
    assert "no bucket 'b'" in explain("s3://b/k", storage, OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2"))
    assert "refused the credentials" in explain(
        "s3://b/k", storage, OSError("AWS Error ACCESS_DENIED during PutObject")
    )


def test_paths():
    assert join("s3://b/k/", "x", "y") == "s3://b/k/x/y"
    assert join("/", "x") == "/x"
    assert local_path("file:///a%20b/c") == "/a b/c"
    assert local_path("~/x") == os.path.expanduser("~/x")
