"""Actors that cannot go on, and an image that ends every process that judges it, in real jobs."""

import os

import pyarrow.parquet as pq
import pytest
from conftest import all_cpus_free, photo
from typer.testing import CliRunner

from pipelines.archive.uris import image_id
from pipelines.cli.main import app
from pipelines.score import dataflow
from pipelines.score.actor import GladActor

pytestmark = pytest.mark.slow
IMAGES = 48


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive")
    for index in range(IMAGES):
        photo(index, root / f"{index:03d}.png")
    return root


def score(archive, bundle, out, *more):
    words = ["score", archive, "--model", bundle, "--out", out, *more]
    return CliRunner().invoke(app, [str(word) for word in words])


def broken(marker, all_of_them):
    """An actor class; the first of its actors, or all, never start."""

    class Broken(GladActor):
        def _prepare(self):
            if all_of_them or not marker.exists():
                marker.write_text(self.name)
            if all_of_them or marker.read_text() == self.name:
                raise RuntimeError("CUDA error: no\ndevice")
            super()._prepare()

    return Broken


def test_an_actor_that_cannot_start_and_an_image_that_ends_the_other_s_process_twice(
    archive, tiny_bundle, tmp_path, monkeypatch, ray_session
):
    deadly = image_id("013.png")

    class Fragile(broken(tmp_path / "marker", all_of_them=False)):
        def _load(self, key):
            (engine,) = engines = super()._load(key)
            work = engine.work

            def work_or_die():
                if deadly in [request.image_id for request in engine.at_work()]:
                    os._exit(1)
                return work()

            engine.work = work_or_die
            return engines

    monkeypatch.setattr(dataflow, "GladActor", Fragile)
    words = ["--actors", "2", "--num-cpus", "0.5", "--batch-size", "4"]
    outcome = score(archive, tiny_bundle, tmp_path / "out", *words)
    assert outcome.exit_code == 0, outcome.output
    (error,) = pq.read_table(tmp_path / "out/errors").to_pylist()
    assert (error["uri"], error["stage"], error["error_type"]) == (str(archive / "013.png"), "score", "deadly")
    assert pq.read_table(tmp_path / "out/results").num_rows == IMAGES - 1
    assert all_cpus_free()


def test_if_none_can_start_the_job_stops_and_says_why(archive, tiny_bundle, tmp_path, monkeypatch, ray_session):
    monkeypatch.setattr(dataflow, "GladActor", broken(tmp_path / "marker", all_of_them=True))
    outcome = score(archive, tiny_bundle, tmp_path / "out", "--actors", "1")
    assert outcome.exit_code == 2, outcome.output
    line = " ".join(outcome.stderr.split())
    assert "cannot go on: RuntimeError: CUDA error: no device; nor can any other process of the job" in line
    assert "RuntimeError: CUDA error: no device; it is started anew" in " ".join(outcome.stdout.split())
    assert all_cpus_free()
