import errno
import os
import stat
import threading

import pytest

from cluster import local
from cluster.storage import Storage, StorageError


@pytest.fixture
def storage():
    return Storage()


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


def test_create_in_a_folder_that_is_a_file_is_no_lost_race(storage, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is in the way"):
        storage.create(f"{tmp_path}/file/started.json", b"{}")


def test_a_folder_that_cannot_be_listed_is_named_itself(storage, tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=f"^{tmp_path}/closed: permission denied"):
        list(storage.walk(str(tmp_path)))


def test_publish_is_whole_readable_and_has_one_winner(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "glad.json").write_text("1")
    target = tmp_path / "models" / "v1"
    assert local.publish(tmp_path / "bundle", target, "glad.json")
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    (tmp_path / "bundle" / "glad.json").write_text("2")
    assert not local.publish(tmp_path / "bundle", target, "glad.json")
    assert (target / "glad.json").read_text() == "1"
    assert os.listdir(target.parent) == ["v1"]


def test_a_folder_in_the_way_is_an_error_and_leaves_nothing_behind(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "models" / "v1").mkdir(parents=True)
    (tmp_path / "models" / "v1" / "notes").write_text("")
    with pytest.raises(OSError, match="not empty"):
        local.publish(tmp_path / "bundle", tmp_path / "models" / "v1", "glad.json")
    assert os.listdir(tmp_path / "models") == ["v1"]


def test_what_the_run_protocol_asks_of_a_disk(storage, tmp_path):
    at = str(tmp_path / "new")
    storage.check_creates(at)
    assert list((tmp_path / "new").iterdir()) == []
    assert not storage.link(f"{at}/none", f"{at}/sub/copy")
    assert storage.create(f"{at}/a", b"one")
    assert storage.link(f"{at}/a", f"{at}/sub/copy")
    assert storage.link(f"{at}/a", f"{at}/sub/copy")
    assert storage.read_all([f"{at}/a", f"{at}/none", f"{at}/sub/copy"]) == [b"one", None, b"one"]
    assert storage.holds(f"{at}/a", 3)
    assert not storage.holds(f"{at}/none", 0)
    storage.write(f"{at}/a", b"two")
    storage.link(f"{at}/a", f"{at}/sub/copy")
    assert storage.read_all([f"{at}/sub/copy"]) == [b"one"]  # what is there is not replaced
    storage.delete_file(f"{at}/a", only=b"one")
    assert storage.read_all([f"{at}/a"]) == [b"two"]
    storage.delete_file(f"{at}/a", only=b"two")
    storage.delete_files([f"{at}/a", f"{at}/sub/copy"])
    assert not storage.link(f"{at}/a", f"{at}/sub/copy")
    assert list((tmp_path / "new/sub").iterdir()) == []
