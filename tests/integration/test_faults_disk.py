"""A disk that gets full in mid-run: one line, exit code 2, and the same command goes on once there is room."""

import os
import subprocess

import pyarrow.parquet as pq
import pytest
from conftest import all_cpus_free, photo
from typer.testing import CliRunner

from pipelines.cli.main import app

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
IMAGES = 80


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_and_room_again(tmp_path, small_disk, tiny_bundle):
    for index in range(IMAGES):
        photo(index, tmp_path / "photos" / f"{index:03d}.png")
    ballast, out = small_disk / "ballast", small_disk / "out"
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    ballast.write_bytes(bytes(free - 96 * 1024))
    words = ["score", tmp_path / "photos", "--model", tiny_bundle, "--out", out, "--actors", 1]

    stopped = CliRunner().invoke(app, [str(word) for word in words])
    assert stopped.exit_code == 2, stopped.output
    assert stopped.stderr.count("\n") == 1, stopped.stderr
    assert str(out) in stopped.stderr
    assert stopped.stderr.strip().endswith("no space left on that disk; make room and give the same command again")
    assert all_cpus_free()
    kept = {path: path.read_bytes() for path in (out / "commits").glob("*.json")}
    assert kept, "full before anything was done"
    assert not list(small_disk.rglob(".*.part"))
    assert not (out / "run.json").exists()

    ballast.unlink()
    outcome = CliRunner().invoke(app, [str(word) for word in words])
    assert outcome.exit_code == 0, outcome.output
    assert "resuming after" in outcome.stdout
    assert all(path.read_bytes() == data for path, data in kept.items())
    uris = pq.read_table(out / "results")["uri"].to_pylist()
    assert sorted(uri[-7:] for uri in uris) == [f"{index:03d}.png" for index in range(IMAGES)]
    assert pq.read_table(out / "errors").num_rows == 0
