"""An image that kills every process that decodes it ends among the errors; all others are scored."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from conftest import photo
from PIL import Image, PngImagePlugin

from cluster import session

pytestmark = pytest.mark.slow
IMAGES = 40

# Stands for a decoder with a bug: imported at the start of every Python process of the job, as site does.
DEADLY = """
import io, os, signal, PIL.Image
calm = PIL.Image.open
def deadly(stream, *arguments, **options):
    if isinstance(stream, io.BytesIO) and b"deadly" in stream.getvalue():
        with open(os.environ["DEATHS"], "a") as deaths:
            deaths.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return calm(stream, *arguments, **options)
PIL.Image.open = deadly
"""


def test_images_that_kill_the_decoder(tmp_path, tiny_bundle):
    for index in range(IMAGES):
        path = photo(index, tmp_path / "photos" / f"{index:03d}.png")
        if index in (7, 20):
            note = PngImagePlugin.PngInfo()
            note.add_text("comment", "deadly")
            Image.open(path).save(path, pnginfo=note)
    (tmp_path / "photos/011.png").write_bytes(b"no image")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(DEADLY)
    places = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | session.QUIET | {"OMP_NUM_THREADS": "1", "DEATHS": str(tmp_path / "deaths")}
    environment["PYTHONPATH"] = os.pathsep.join(places)

    words = ["score", tmp_path / "photos", "--model", tiny_bundle, "--out", tmp_path / "out", "--actors", "1"]
    glad = [sys.executable, "-c", "from pipelines.cli.main import main; main()", *map(str, words)]
    done = subprocess.run(glad, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr

    errors = {row["uri"][-7:]: row for row in pq.read_table(tmp_path / "out/errors").to_pylist()}
    assert {name: row["error_type"] for name, row in errors.items()} == {
        "007.png": "deadly",
        "011.png": "not_an_image",
        "020.png": "deadly",
    }
    assert "died 2 times" in errors["007.png"]["message"]
    scored = [uri[-7:] for uri in pq.read_table(tmp_path / "out/results")["uri"].to_pylist()]
    assert sorted(scored + list(errors)) == [f"{index:03d}.png" for index in range(IMAGES)]
    counts = json.loads((tmp_path / "out/run.json").read_text())["counts"]
    assert (counts["scored"], counts["errors"]) == (IMAGES - 3, 3)
    assert len((tmp_path / "deaths").read_text()) == 4  # two tries each
