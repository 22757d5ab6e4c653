"""The shipped KubeRay files, and the lines of `glad cluster check` about broken ones."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.check_file import check_cluster_file
from cluster.check_kubernetes import KINDS, ray_problems, schema_problems, without_nulls

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_shipped_files_are_right_and_name_what_to_change(name):
    problems, examples, _ = check_cluster_file(KUBERAY / name)
    assert problems == []
    assert examples


def test_both_files_describe_the_same_cluster():
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
        (lambda c: c["spec"].update(autoscaling=True), ["spec.autoscaling: unknown field"]),
        (lambda c: c["spec"].update(authOption={}), ["spec.authOption: unknown field; did you mean 'authOptions'?"]),
        (lambda c: c["spec"].update(xyz=1), ["spec.xyz: unknown field; known: rayVersion,"]),
        (lambda c: c.update(apiVersion="ray.io/v2"), ["apiVersion: 'ray.io/v2' is not one of ray.io/v1"]),
        (lambda c: c["metadata"].pop("name"), ["metadata.name: this field is required"]),
        (
            lambda c: c["spec"]["autoscalerOptions"].update(upscalingMode="aggressive"),
            ["autoscalerOptions.upscalingMode: 'aggressive' is not one of", "did you mean 'Aggressive'?"],
        ),
        (lambda c: c["spec"]["workerGroupSpecs"][0].update(minReplicas=-1), ["workerGroupSpecs.0.minReplicas: -1"]),
        (lambda c: c["spec"]["workerGroupSpecs"][0].update(maxReplicas="8"), ["0.maxReplicas: '8'", "'integer'"]),
        (lambda c: c["spec"]["workerGroupSpecs"][0].pop("maxReplicas"), ["workerGroupSpecs.0.maxReplicas", "required"]),
        (lambda c: c["spec"]["workerGroupSpecs"][0].update(minReplicas=9), ["minReplicas is above"]),
        (lambda c: container(c).update(imag="x"), ["workerGroupSpecs.gpu.template.spec.containers", "imag"]),
        (lambda c: container(c)["resources"].update(limits="many"), ["template.spec", "many"]),
        (lambda c: c["spec"].pop("authOptions"), ["authOptions.mode", "anybody"]),
        (lambda c: c["spec"].update(authOptions=None), ["authOptions.mode", "anybody"]),
        (lambda c: c["spec"]["authOptions"].update(mode="disabled"), ["authOptions.mode", "anybody"]),
        (lambda c: c["spec"]["headGroupSpec"].update(serviceType="LoadBalancer"), ["open to the outside"]),
        (lambda c: c["spec"]["headGroupSpec"].update(enableIngress=True), ["open to the outside"]),
        (lambda c: container(c).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]), ["credentials"]),
        (lambda c: c.update(kind="Pond"), ["no ray.io/v1 Pond", "neither a RayCluster"]),
    ],
)
def test_a_broken_file_is_one_line_per_problem(cluster, tmp_path, change, words):
    change(cluster)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(cluster))
    problems = check_cluster_file(path).problems
    for word in words:
        assert word in "\n".join(problems)


def test_every_problem_has_a_line_and_no_problem_has_two(cluster):
    for name in ("minReplicas", "maxReplicas"):
        cluster["spec"]["workerGroupSpecs"][0].pop(name)
    cluster["spec"]["rayversion"] = "2.60.0"
    assert schema_problems(cluster) == [
        "spec.rayversion: unknown field; did you mean 'rayVersion'?",
        "spec.workerGroupSpecs.0.minReplicas: this field is required",
        "spec.workerGroupSpecs.0.maxReplicas: this field is required",
    ]


def test_fields_without_a_value_are_no_fields(cluster):
    cluster["spec"]["suspend"] = None
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"] = None
    assert ray_problems(without_nulls(cluster)) == []


def test_a_job_on_a_running_cluster_has_no_cluster_to_check():
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "score"}}
    assert ray_problems(job | {"spec": {"entrypoint": "glad", "clusterSelector": {"ray.io/cluster": "glad"}}}) == []
    assert ray_problems(job | {"spec": {}}) == ["spec.entrypoint: this field is required"]


def test_the_schema_is_one_and_every_part_of_it_is_used():
    schema = yaml.safe_load((KUBERAY.parent / "kuberay_schema.yaml").read_text())
    Draft202012Validator.check_schema(schema)
    used = set(re.findall(r"#/\$defs/(\w+)", str(schema))) | set(KINDS)
    assert used == set(schema["$defs"])
