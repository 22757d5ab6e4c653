"""Checks of KubeRay files before `kubectl apply`: unknown and missing fields, and what keeps strangers out.

The models below hold the fields of KubeRay 1.5's RayCluster and RayJob (ray.io/v1) that a user of this project may
need; any other is reported. Pods are held against Kubernetes' own schema by kubernetes-validate.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.session import SessionError

EXAMPLES = ("registry.example.com", "arn:aws:iam::123456789012", "s3://your-")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Metadata(_Strict):
    name: str
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class _Auth(_Strict):
    mode: Literal["token", "disabled"]


class _Autoscaler(_Strict):
    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: int | None = Field(None, ge=0)
    upscalingMode: Literal["Default", "Conservative", "Aggressive"] | None = None
    image: str | None = None
    imagePullPolicy: Literal["Always", "IfNotPresent", "Never"] | None = None
    resources: dict[str, Any] = {}
    env: list[dict[str, Any]] = []
    envFrom: list[dict[str, Any]] = []
    volumeMounts: list[dict[str, Any]] = []
    securityContext: dict[str, Any] = {}


class _Group(_Strict):
    rayStartParams: dict[str, str] = {}
    template: dict[str, Any]
    resources: dict[str, str] = {}
    labels: dict[str, str] = {}


class _Head(_Group):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    headService: dict[str, Any] | None = None
    enableIngress: bool | None = None


class _Workers(_Group):
    groupName: str
    replicas: int = Field(0, ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)
    numOfHosts: int = Field(1, ge=1)
    idleTimeoutSeconds: int | None = Field(None, ge=0)
    suspend: bool | None = None
    scaleStrategy: dict[str, Any] | None = None


class _ClusterSpec(_Strict):
    rayVersion: str | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: _Autoscaler | None = None
    authOptions: _Auth | None = None
    gcsFaultToleranceOptions: dict[str, Any] | None = None
    headServiceAnnotations: dict[str, str] = {}
    headGroupSpec: _Head
    workerGroupSpecs: list[_Workers] = []
    managedBy: str | None = None
    upgradeStrategy: dict[str, Any] | None = None
    suspend: bool | None = None


class _JobSpec(_Strict):
    entrypoint: str
    rayClusterSpec: _ClusterSpec | None = None
    clusterSelector: dict[str, str] = {}
    runtimeEnvYAML: str | None = None
    shutdownAfterJobFinishes: bool | None = None
    ttlSecondsAfterFinished: int | None = Field(None, ge=0)
    activeDeadlineSeconds: int | None = Field(None, ge=1)
    backoffLimit: int | None = Field(None, ge=0)
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] | None = None
    submitterPodTemplate: dict[str, Any] | None = None
    submitterConfig: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    jobId: str | None = None
    entrypointNumCpus: float | None = None
    entrypointNumGpus: float | None = None
    entrypointResources: str | None = None
    deletionStrategy: dict[str, Any] | None = None
    managedBy: str | None = None
    suspend: bool | None = None


class _RayCluster(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: _Metadata
    spec: _ClusterSpec


class _RayJob(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: _Metadata
    spec: _JobSpec


KINDS: dict[str, type[BaseModel]] = {"RayCluster": _RayCluster, "RayJob": _RayJob}


def check_manifests(documents: list[dict[str, Any]], text: str) -> tuple[list[str], list[str]]:
    """Everything wrong with the documents of a KubeRay file, and what is still as in the example; a line each.

    Raises:
        SessionError: kubernetes-validate is not installed.
    """
    problems = []
    for document in documents:
        kind = document.get("kind")
        name = f"{kind} {(document.get('metadata') or {}).get('name', '')}".strip()
        found = _ray(document) if kind in KINDS else _kubernetes(document)
        problems += [f"{name}: {problem}" for problem in found]
    if not any(document.get("kind") in KINDS for document in documents):
        problems.append("neither a RayCluster nor a RayJob in it; see cluster/kuberay/")
    return problems, [f"{example} is the example's: put your own" for example in EXAMPLES if example in text]


def _ray(document: dict[str, Any]) -> list[str]:
    try:
        KINDS[document["kind"]].model_validate(document)
    except ValidationError as error:
        return [f"{'.'.join(map(str, of['loc']))}: {of['msg']}" for of in error.errors()]
    spec = document["spec"]
    if document["kind"] == "RayJob":
        if spec.get("rayClusterSpec") is None:
            return []
        spec = spec["rayClusterSpec"]
    problems = []
    groups = [("headGroupSpec", spec["headGroupSpec"])]
    groups += [(f"workerGroupSpecs.{group['groupName']}", group) for group in spec.get("workerGroupSpecs") or []]
    for where, group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | group["template"]
        problems += [f"{where}.template.{problem}" for problem in _kubernetes(pod)]
    for _, group in groups[1:]:
        if group["minReplicas"] > group["maxReplicas"]:
            problems.append(f"workerGroupSpecs.{group['groupName']}: minReplicas is above maxReplicas")
    if (spec.get("authOptions") or {}).get("mode") != "token":
        problems.append("authOptions.mode: not token, so anybody who reaches the head submits jobs; write mode: token")
    head = spec["headGroupSpec"]
    if head.get("serviceType") in ("NodePort", "LoadBalancer") or head.get("enableIngress"):
        problems.append("headGroupSpec: the dashboard is open to the outside; use ClusterIP and kubectl port-forward")
    if "AWS_SECRET_ACCESS_KEY" in str(spec) and "secretKeyRef" not in str(spec):
        problems.append("credentials are written in the file: use a service account with a role")
    return problems


def _kubernetes(document: dict[str, Any]) -> list[str]:
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
