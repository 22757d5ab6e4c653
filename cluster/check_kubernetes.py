"""Checks of KubeRay files before `kubectl apply`: unknown and missing fields, and whatever lets strangers in.

RayCluster and RayJob are checked against kuberay_schema.yaml, pods and all other kinds against Kubernetes' own schema.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.check_aws import gpus_differ
from cluster.check_versions import open_versions
from cluster.session import GPUS_TO_COME, SessionError

if TYPE_CHECKING:
    from jsonschema import ValidationError

NAME_LENGTHS = {"RayCluster": 53, "RayJob": 47}  # names of what KubeRay makes of them are longer
KINDS = tuple(NAME_LENGTHS)


def check_manifests(documents: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """All problems of the YAML documents of a KubeRay file, and what may be meant; a line each.

    Raises:
        SessionError: kubernetes-validate is not installed.
    """
    problems: list[str] = []
    notes: list[str] = []
    for document in map(without_nulls, documents):
        kind, metadata = document.get("kind"), document.get("metadata") or {}
        name = f"{kind} {metadata.get('name') or metadata.get('generateName') or ''}".strip()
        lines = ray_problems(document) if kind in KINDS else kubernetes_problems(document)
        problems += [f"{name}: {line}" for line in (*lines, *open_versions(document))]
        if kind in KINDS and not lines and (cluster := cluster_of(document)):
            notes += [f"{name}: {line}" for line in (*gpu_notes(cluster), *version_notes(cluster))]
    if not any(document.get("kind") in (*KINDS, "ServiceAccount") for document in documents):
        problems.append("neither a RayCluster nor a RayJob in it; see cluster/kuberay/")
    return problems, notes


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """The cluster's ``spec`` of a RayCluster or RayJob; empty if a job selects a running cluster instead."""
    return document["spec"] if document["kind"] == "RayCluster" else document["spec"].get("rayClusterSpec", {})


def without_nulls(value: Any) -> Any:
    """Drops the fields without a value from a document, as Kubernetes does."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def ray_problems(document: dict[str, Any]) -> list[str]:
    """Problems of a RayCluster or RayJob; its pods are checked if all of its fields are right."""
    problems = schema_problems(document)
    if problems:
        return problems
    problems += refused_by_operator(document)
    cluster = cluster_of(document)
    if not cluster:
        return problems
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs", [])
    groups = {"headGroupSpec": head} | {f"workerGroupSpecs.{group['groupName']}": group for group in workers}
    for name, group in groups.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | group["template"]
        problems += [f"{name}.template.{problem}" for problem in kubernetes_problems(pod)]
    for name, group in groups.items():
        if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
            problems.append(f"{name}: minReplicas is above maxReplicas")
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"]):
            problems.append(
                f"{name}: resources are in rayStartParams as well, which KubeRay refuses; write one of them"
            )
    return problems + open_doors(cluster)


def refused_by_operator(document: dict[str, Any]) -> list[str]:
    """What KubeRay's operator refuses when it looks at a document that Kubernetes has taken."""
    problems, spec, metadata = [], document["spec"], document["metadata"]
    name, most = metadata.get("name") or f"{metadata['generateName']}xxxxx", NAME_LENGTHS[document["kind"]]
    if len(name) > most or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        problems.append(f"metadata.name: {name}: at most {most} small letters, digits and -, a letter first")
    if document["kind"] == "RayJob":
        if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
            problems.append("spec.rayClusterSpec: neither this nor a clusterSelector, so the job has no cluster")
        if spec.get("clusterSelector") and spec.get("backoffLimit"):
            problems.append("spec.backoffLimit: not with a clusterSelector; the job gets no new cluster")
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            problems.append("spec.ttlSecondsAfterFinished: only with shutdownAfterJobFinishes: true")
    if (cluster := cluster_of(document)) and not cluster.get("rayVersion"):
        problems.append("rayVersion: none, which KubeRay refuses with a token; write that of the image")
    for version in set(re.findall(r"rayproject/ray:(\d[\d.]*)", str(cluster))) - {cluster.get("rayVersion")}:
        problems.append(f"rayVersion: {cluster.get('rayVersion')}, but an image has Ray {version}")
    return problems


def version_notes(cluster: dict[str, Any]) -> list[str]:
    """A line if a cluster has another Ray than an image built here."""
    version, here = cluster.get("rayVersion"), importlib.metadata.version("ray")
    other = f"rayVersion: {version}, but Ray {here} is installed here: see that the image was built with {version}"
    return [other] if version and version != here else []


def gpu_notes(cluster: dict[str, Any]) -> list[str]:
    """A line if the GPUs that the head of a cluster's ``spec`` declares are not those that may come."""
    most = 0
    for group in cluster.get("workerGroupSpecs", []):
        for container in group["template"]["spec"]["containers"][:1]:
            gpus = int(container.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
            most += gpus * group["maxReplicas"] * group.get("numOfHosts", 1)
    text = cluster["headGroupSpec"].get("rayStartParams", {}).get("resources", "")
    found = re.search(rf"{GPUS_TO_COME}\W+(\d+)", text)  # JSON in quotation marks in quotation marks
    declared = int(found[1]) if found else 0
    return [gpus_differ(declared, most)] if declared != most else []


def open_doors(cluster: dict[str, Any]) -> list[str]:
    """Settings of a cluster's ``spec`` that Kubernetes accepts but that let strangers in or give secrets away."""
    problems = []
    if cluster.get("authOptions", {}).get("mode") != "token":
        problems.append("authOptions.mode: not token, so anybody who reaches the head submits jobs; write mode: token")
    head = cluster["headGroupSpec"]
    if head.get("serviceType") in ("NodePort", "LoadBalancer") or head.get("enableIngress"):
        problems.append("headGroupSpec: the dashboard is open to the outside; use ClusterIP and kubectl port-forward")
    if "AWS_SECRET_ACCESS_KEY" in str(cluster) and "secretKeyRef" not in str(cluster):
        problems.append("credentials are written in the file: use a service account with a role")
    return problems


def schema_problems(document: dict[str, Any]) -> list[str]:
    """Unknown and missing fields and wrong values of a RayCluster or RayJob, each with its path."""
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(_schema() | {"$ref": f"#/$defs/{document['kind']}"})
    errors = sorted(validator.iter_errors(document), key=lambda error: [str(part) for part in error.absolute_path])
    return list(dict.fromkeys(line for error in errors for line in _lines(error)))  # each missing field comes once


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text())


def _lines(error: ValidationError) -> Iterator[str]:
    path = ".".join(str(part) for part in error.absolute_path)
    inside = f"{path}." if path else ""
    instance: Any = error.instance
    rule: Any = error.validator_value
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        yield from (f"{inside}{name}: unknown field{_nearest(name, known)}" for name in instance if name not in known)
    elif error.validator == "required":
        yield from (f"{inside}{name}: this field is required" for name in rule if name not in instance)
    elif error.validator == "anyOf":  # of metadata
        yield f"{inside}name: this field is required, or generateName"
    elif error.validator == "enum":
        yield f"{path}: {instance!r} is not one of {', '.join(rule)}{_nearest(str(instance), rule, listed=True)}"
    else:
        yield f"{path}: {error.message}"


def _nearest(name: str, known: list[str], listed: bool = False) -> str:
    """The tail of a line about an unknown name: the nearest known one, or all unless they are ``listed`` already."""
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"; did you mean '{near[0]}'?"
    return "" if listed else f"; known: {', '.join(known)}"


def kubernetes_problems(document: dict[str, Any]) -> list[str]:
    """The first problem of a document by Kubernetes' schema, if any.

    Raises:
        SessionError: kubernetes-validate is not installed.
    """
    try:
        import kubernetes_validate
    except ImportError as error:
        raise SessionError(
            "checking Kubernetes files needs kubernetes-validate: pip install 'glad-ray[kubernetes]'"
        ) from error
    try:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path)) or 'it'}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"Kubernetes has no {document.get('apiVersion')} {document.get('kind')}"]
    return []
