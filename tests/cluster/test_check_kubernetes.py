"""The KubeRay manifests, and what `glad cluster check` says of broken ones."""

import copy
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.check_file import check_cluster_file
from pipelines.cli.main import app

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_shipped_manifests_are_right_and_say_what_to_change(name):
    problems, unchanged = check_cluster_file(KUBERAY / name)
    assert problems == []
    assert unchanged


def test_both_manifests_describe_the_same_cluster():
    (_, cluster), (job,) = (
        list(yaml.safe_load_all((KUBERAY / name).read_text())) for name in ("raycluster.yaml", "rayjob.yaml")
    )
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]


@pytest.fixture
def cluster():
    return copy.deepcopy(list(yaml.safe_load_all((KUBERAY / "raycluster.yaml").read_text()))[1])


def container(cluster):
    return cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["spec"].update(autoscaling=True), ["spec.autoscaling"]),
        (lambda c: c["spec"]["workerGroupSpecs"][0].pop("maxReplicas"), ["workerGroupSpecs.0.maxReplicas", "required"]),
        (lambda c: c["spec"]["workerGroupSpecs"][0].update(minReplicas=9), ["minReplicas is above"]),
        (lambda c: container(c).update(imag="x"), ["workerGroupSpecs.gpu.template.spec.containers", "imag"]),
        (lambda c: container(c)["resources"].update(limits="many"), ["template.spec", "many"]),
        (lambda c: c["spec"].pop("authOptions"), ["authOptions.mode", "anybody"]),
        (lambda c: c["spec"]["headGroupSpec"].update(serviceType="LoadBalancer"), ["open to the outside"]),
        (lambda c: container(c).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]), ["credentials"]),
        (lambda c: c.update(kind="Pond"), ["no ray.io/v1 Pond", "neither a RayCluster"]),
    ],
)
def test_a_broken_manifest_is_one_line_per_problem(cluster, tmp_path, change, words):
    change(cluster)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(cluster))
    found = CliRunner().invoke(app, ["cluster", "check", str(path)])
    assert found.exit_code == 1
    for word in words:
        assert word in found.stdout
