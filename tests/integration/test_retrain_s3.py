"""`glad retrain` and scoring by registry, with dataset and registry on a real S3 server."""

import io
import json

import numpy as np
import pytest
from conftest import make_bucket
from PIL import Image
from pyarrow.fs import FileSelector, FileType
from test_faults_train import eager, kill_a_training_worker  # noqa: F401  (the first is a fixture)
from typer.testing import CliRunner

from cluster.storage import Storage
from pipelines.cli.main import app
from pipelines.models import registry

pytestmark = pytest.mark.slow


DATASET = "s3://retrain/data"


def upload_dataset(storage):
    """Two categories of six good images; those of the second are torn until they are uploaded again."""
    rng = np.random.default_rng(0)
    torn = {}
    for category in ("bolt", "nut"):
        for folder, count in (("train/good", 6), ("test/good", 2)):
            for number in range(count):
                stream = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(stream, "PNG")
                uri, data = f"{DATASET}/{category}/{folder}/{number}.png", stream.getvalue()
                if (category, folder) == ("nut", "train/good"):
                    torn[uri] = data
                    data = b"torn"
                storage.write(uri, data)
    return torn


def test_categories_side_by_side_into_a_registry(
    preset_bundle,
    s3_server,
    ray_session,
    tmp_path,
    monkeypatch,
    eager,  # noqa: F811
):
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    make_bucket(s3_server, "retrain")
    storage, home = Storage.from_environment(), "s3://retrain/registry"
    torn = upload_dataset(storage)

    def retrain():
        options = ["--base", str(preset_bundle), "--out", home, "--steps", "40", "--batch-size", "2"]
        return CliRunner().invoke(app, ["retrain", DATASET, *options])

    killed = kill_a_training_worker(lambda: any("snapshot" in path for path, _ in storage.walk(f"{home}/.work/bolt")))
    outcome = retrain()
    assert outcome.exit_code == 1, outcome.output
    assert len(killed) == 1
    assert "readable good images" in outcome.stdout
    assert registry.current(home, "nut", storage) is None
    first = registry.current(home, "bolt", storage)
    assert first.reason == "first version"

    for uri, data in torn.items():
        storage.write(uri, data)
    outcome = retrain()
    assert outcome.exit_code == 0, outcome.output
    assert "up to date" in outcome.stdout
    assert registry.current(home, "bolt", storage) == first
    assert storage.kind(f"{home}/nut/{registry.current(home, 'nut', storage).version}.training.parquet") == "file"
    filesystem, work = storage.resolve(f"{home}/.work/nut")
    left = filesystem.get_file_info(FileSelector(work, allow_not_found=True, recursive=True))
    assert not [info.path for info in left if info.type == FileType.File]  # this server keeps empty folders

    out = tmp_path / "run"
    outcome = CliRunner().invoke(app, ["score", DATASET, "--model", home, "--out", str(out), "--actors", "1"])
    assert outcome.exit_code == 0, outcome.output
    models = json.loads((out / "run.json").read_text())["models"]
    assert {name: model["model_id"] for name, model in models.items()} == {
        name: registry.current(home, name, storage).version for name in ("bolt", "nut")
    }
    sheet = CliRunner().invoke(app, ["show", str(out), "--out", str(tmp_path / "sheet.png")])
    assert sheet.exit_code == 0, sheet.output
