"""The real job on real Ray against a real S3 server: archive, bundle and results in buckets."""

import io
import json
import tarfile

import pyarrow.parquet as pq
import pytest
from conftest import make_bucket
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.archive import listing, manifest, pieces
from pipelines.archive.sources import list_source
from pipelines.cli.main import app

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def glad(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """A `Storage` on the server, with the environment a user would have set."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLAD_CACHE", str(tmp_path / "cache"))
    return Storage.from_environment()


@pytest.fixture(scope="module")
def archive(s3_server, photos):
    """s3://archive: seven PNGs, three broken files, and a tar shard with three more images and a text member."""
    make_bucket(s3_server, "archive")
    storage = Storage(s3_server["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
    pictures = [path.read_bytes() for path in sorted(photos.rglob("*.png"))]
    for number in range(7):
        storage.write(f"s3://archive/photos/line {number % 2}/ü{number}.png", pictures[number])
    for name, data in (("empty.png", b""), ("torn.png", pictures[0][:100]), ("page.html", b"<html>")):
        storage.write(f"s3://archive/photos/broken/{name}", data)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as shard:
        for number in range(7, 10):
            for suffix, data in ((".png", pictures[number]), (".json", b"{}")):
                member = tarfile.TarInfo(f"{number:04d}{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    storage.write("s3://archive/photos/shard.tar", stream.getvalue())
    return "s3://archive/photos"


def read(storage, uri):
    filesystem, path = storage.resolve(uri)
    return pq.read_table(path, filesystem=filesystem)


def test_archive_and_bundle_and_results_on_s3(s3, s3_server, archive, tiny_bundle, tmp_path):
    make_bucket(s3_server, "models")
    make_bucket(s3_server, "verdicts")
    for path in tiny_bundle.rglob("*"):
        if path.is_file():
            s3.write(f"s3://models/tiny/{path.relative_to(tiny_bundle)}", path.read_bytes())

    out = "s3://verdicts/run 1"
    outcome = glad("score", archive, "--model", "s3://models/tiny", "--out", out, "--batch-size", 4, "--actors", 1)
    assert outcome.exit_code == 0, outcome.output
    run = json.loads(s3.read(f"{out}/run.json"))
    assert run["counts"] | {"anomalies": 0} == {
        "images": 13,
        "scored": 10,
        "anomalies": 0,
        "errors": 3,
        "duplicates": 0,
        "blank": 0,
        "doubtful": 0,
        "left_out": {"files in tars that are no images": 3},
        "pages": 0,
    }
    results, errors = read(s3, f"{out}/results"), read(s3, f"{out}/errors")
    assert len(set(results["image_id"].to_pylist()) | set(errors["image_id"].to_pylist())) == 13
    kinds = {row["uri"].rsplit("/", 1)[1]: row["error_type"] for row in errors.to_pylist()}
    assert kinds == {"empty.png": "empty", "torn.png": "damaged", "page.html": "not_an_image"}
    assert "tar://0007.png::s3://archive/photos/shard.tar" in results["uri"].to_pylist()
    assert "s3://archive/photos/line 1/ü1.png" in results["uri"].to_pylist()

    again = glad("score", archive, "--model", "s3://models/tiny", "--out", out)
    assert again.exit_code == 0, again.output
    assert "complete" in again.stdout
    again = glad("score", archive, "--model", tiny_bundle, "--out", out, "--seed", 1)
    assert again.exit_code == 2
    assert "seed was 0, now 1" in again.stderr

    shown = glad("show", out, "--top", 4, "--out", tmp_path / "sheet.png")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "sheet.png").stat().st_size > 5_000


def test_a_glob_on_s3_names_its_images(s3, archive):
    rows = list(list_source(f"{archive}/line*/*.png", None, s3))
    assert sorted(row["uri"] for row in rows) == sorted(f"{archive}/line {n % 2}/ü{n}.png" for n in range(7))


def test_s3_mistakes_are_one_line(s3, s3_server, archive, photos, tiny_bundle, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(outcome, *words):
        assert outcome.exit_code == 2, outcome.output
        assert outcome.stderr.count("\n") == 1, outcome.stderr
        for word in words:
            assert word in outcome.stderr

    refused(glad("score", "s3://nowhere/x", "--model", tiny_bundle, "--out", out), "no bucket 'nowhere'")
    refused(glad("score", photos, "--model", tiny_bundle, "--out", "s3://nowhere/x"), "no bucket 'nowhere'")
    refused(glad("score", "s3://archive/none", "--model", tiny_bundle, "--out", out), "s3://archive/none", "no such")
    refused(glad("score", photos, "--model", "s3://archive/photos", "--out", out), "no model bundle there")
    refused(glad("score", "s3://archive/pho*/none", "--model", tiny_bundle, "--out", out), "no images")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused(glad("score", archive, "--model", tiny_bundle, "--out", out), "refused the credentials")
    refused(glad("score", photos, "--model", tiny_bundle, "--out", "s3://archive/out"), "refused the credentials")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    refused(glad("score", archive, "--model", tiny_bundle, "--out", out), "refused the credentials")


def test_create_has_one_winner_on_s3(s3, s3_server):
    make_bucket(s3_server, "claims")
    assert s3.create("s3://claims/a/marker", b"first")
    assert not s3.create("s3://claims/a/marker", b"second")
    assert s3.read("s3://claims/a/marker") == b"first"


def test_pieces_of_a_bucket_are_one_walk(s3, archive, tmp_path, monkeypatch):
    assert [entry.path for entry in s3.level(archive)] == ["broken", "line 0", "line 1", "shard.tar"]
    rows = list(list_source("s3://archive", None, s3))
    assert all(row["version"] == s3.entry(row.get("shard") or row["uri"]).version for row in rows)
    assert all(row["version"].startswith('"') for row in rows)  # an ETag
    for folders in (1, 3, 64):
        monkeypatch.setattr(pieces, "FOLDERS", folders)
        request = pieces.Archive("s3://archive", None, s3, False)
        out, parts = tmp_path / str(folders), pieces.split(request)
        counts = [listing.write_manifest(request, piece, n, str(out))[0].rows for n, piece in enumerate(parts)]
        found = manifest.read_manifest(str(out), counts, 0, 13, s3)["image_id"].to_pylist()
        assert found == [row["image_id"] for row in list_source("s3://archive", None, s3)]
