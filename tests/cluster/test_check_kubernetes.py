"""The shipped KubeRay files, and the lines of `glad cluster check` about broken ones."""

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.check_file import check_cluster_file
from cluster.check_kubernetes import KINDS, ray_problems, schema_problems, without_nulls

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "account.yaml"])
def test_the_shipped_files_are_right_and_name_what_to_change(name):
    problems, examples, _ = check_cluster_file(KUBERAY / name)
    assert problems == []
    assert examples


def test_both_files_describe_the_same_cluster():
    cluster, job = (yaml.safe_load((KUBERAY / name).read_text()) for name in ("raycluster.yaml", "rayjob.yaml"))
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]


def test_the_files_the_image_and_the_lock_have_one_ray_and_one_account(cluster):
    (base,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py311-gpu$", (KUBERAY / "Dockerfile").read_text(), re.M)
    (locked,) = re.findall(r"^ray==(.+)$", (KUBERAY.parents[1] / "requirements.lock").read_text(), re.M)
    assert base == locked == cluster["spec"]["rayVersion"]
    account = yaml.safe_load((KUBERAY / "account.yaml").read_text())["metadata"]["name"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert {group["template"]["spec"]["serviceAccountName"] for group in groups} == {account}


def test_the_head_takes_no_work_and_gpu_pods_have_time_to_drain(cluster):
    head = cluster["spec"]["headGroupSpec"]["rayStartParams"]
    assert (head["num-cpus"], head["memory"]) == ("0", "0")
    gpu, cpu = cluster["spec"]["workerGroupSpecs"]
    assert "nvidia.com/gpu" not in str(cpu)
    for group in (gpu, cpu):
        pod = group["template"]["spec"]
        drain = {variable["name"]: variable["value"] for variable in pod["containers"][0]["env"]}
        seconds = float(drain["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert seconds + 20 < pod["terminationGracePeriodSeconds"] < 120  # what a spot machine is given
    volumes = {volume["name"]: volume["emptyDir"] for volume in gpu["template"]["spec"]["volumes"]}
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    # Ray takes 30 % of the memory for its object store, and at most 95 % of what is mounted.
    assert 0.95 * gigabytes(volumes["memory"]["sizeLimit"]) > 0.3 * gigabytes(limits["memory"])
    assert float(drain_value(gpu, "GLAD_CACHE_GB")) * 1e9 < gigabytes(volumes["bundles"]["sizeLimit"]) * 2**30


def gigabytes(text):
    return float(text.removesuffix("Gi"))


def drain_value(group, name):
    return next(v["value"] for v in group["template"]["spec"]["containers"][0]["env"] if v["name"] == name)


def test_docker_is_sent_what_the_image_installs_and_nothing_else():
    lines = (KUBERAY.parents[1] / ".dockerignore").read_text().splitlines()
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert "*" in lines
    packages = {"glad_core", "pipelines", "cluster"}
    assert allowed == packages | {"requirements.lock", "pyproject.toml", "README.md", "LICENSE"}
    brought = yaml.safe_load((KUBERAY.parents[1] / "ray_cluster.yaml").read_text())["file_mounts"].values()
    assert allowed == set(brought) - {"~/.ray/auth_token"}


@pytest.fixture
def cluster():
    return yaml.safe_load((KUBERAY / "raycluster.yaml").read_text())


@pytest.fixture
def job():
    return yaml.safe_load((KUBERAY / "rayjob.yaml").read_text())


def container(cluster):
    return cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["spec"].update(autoscaling=True), ["spec.autoscaling: unknown field"]),
        (lambda c: c["spec"].update(authOption={}), ["spec.authOption: unknown field; did you mean 'authOptions'?"]),
        (lambda c: c["spec"].update(xyz=1), ["spec.xyz: unknown field; known: rayVersion,"]),
        (lambda c: c.update(apiVersion="ray.io/v2"), ["apiVersion: 'ray.io/v2' is not one of ray.io/v1"]),
        (lambda c: c["metadata"].pop("name"), ["metadata.name: this field is required, or generateName"]),
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
        (lambda c: c["spec"].pop("rayVersion"), ["rayVersion: none"]),
        (lambda c: container(c).update(image="rayproject/ray:2.9.0-py311"), ["rayVersion", "Ray 2.9.0"]),
        (lambda c: container(c).update(image="r.io/glad-ray"), ["image", "r.io/glad-ray", "version"]),
        (lambda c: container(c).update(image="r.io/glad-ray:latest"), ["image", "r.io/glad-ray:latest", "version"]),
        (lambda c: container(c).update(args=["pip install ray"]), ["args: ray", "requirements.lock"]),
        (lambda c: c["spec"]["headGroupSpec"].update(resources={"CPU": "1"}), ["headGroupSpec", "rayStartParams"]),
        (lambda c: c["metadata"].update(name="Glad_1"), ["metadata.name: Glad_1", "small letters"]),
        (lambda c: c["metadata"].update(name="g" * 54), ["metadata.name", "53"]),
        (lambda c: c["spec"].update(gcsFaultToleranceOptions={"backend": "sqlite"}), ["'sqlite' is not one of"]),
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda j: j["metadata"].pop("generateName"), "metadata.name: this field is required, or generateName"),
        (lambda j: j["metadata"].update(generateName="g" * 43), "at most 47"),
        (lambda j: j["spec"].pop("rayClusterSpec"), "neither this nor a clusterSelector"),
        (lambda j: j["spec"].update(clusterSelector={"ray.io/cluster": "glad"}), "spec.backoffLimit"),
        (lambda j: j["spec"].update(shutdownAfterJobFinishes=False), "spec.ttlSecondsAfterFinished"),
        (lambda j: j["spec"].update(runtimeEnvYAML="pip: [ray]"), "spec.runtimeEnvYAML: pip: ray"),
        (lambda j: j["spec"].update(entrypoint="pip install x && glad"), "spec.entrypoint: x"),
    ],
)
def test_a_broken_job(job, tmp_path, change, words):
    change(job)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(job))
    (problem,) = check_cluster_file(path).problems
    assert words in problem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["spec"]["workerGroupSpecs"][0].update(maxReplicas=50), "is 8, but 50 GPUs may come"),
        (lambda c: c["spec"]["headGroupSpec"]["rayStartParams"].pop("resources"), "is 0, but 8 GPUs may come"),
        (lambda c: c["spec"].update(rayVersion="2.59.0"), "Ray 2.60"),
    ],
)
def test_what_may_be_meant_is_noted(cluster, tmp_path, change, words):
    change(cluster)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(cluster))
    findings = check_cluster_file(path)
    assert findings.problems == []
    assert words in findings.notes[0]


def test_a_job_on_a_running_cluster_has_no_cluster_to_check():
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "score"}}
    assert ray_problems(job | {"spec": {"entrypoint": "glad", "clusterSelector": {"ray.io/cluster": "glad"}}}) == []
    assert ray_problems(job | {"spec": {}}) == ["spec.entrypoint: this field is required"]


def test_the_schema_is_one_and_every_part_of_it_is_used():
    schema = yaml.safe_load((KUBERAY.parent / "kuberay_schema.yaml").read_text())
    Draft202012Validator.check_schema(schema)
    used = set(re.findall(r"#/\$defs/(\w+)", str(schema))) | set(KINDS)
    assert used == set(schema["$defs"])
