"""Checks of a cluster file before a machine is started: Ray's own schema, and whatever lets strangers in."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.check_kubernetes import check_manifests
from cluster.session import SessionError

EXAMPLES = ("203.0.113.0/24", "123456789012")  # in the shipped ray_cluster.yaml; they belong to nobody


def check_cluster_file(path: Path) -> tuple[list[str], list[str]]:
    """All problems of a file for ``ray up`` or KubeRay, and the example values still in it; a line each.

    Raises:
        SessionError: no such file, or not YAML.
    """
    try:
        text = path.read_text()
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
    except OSError as error:
        raise SessionError(f"{path}: {error.strerror or error}; name one such as ray_cluster.yaml") from error
    except UnicodeDecodeError as error:
        raise SessionError(f"{path}: not text; name a YAML file such as ray_cluster.yaml") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        raise SessionError(f"{path}: not YAML{line}: {getattr(error, 'problem', error)}; correct it there") from error
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise SessionError(f"{path}: a cluster file is a table of settings; see ray_cluster.yaml")
    config = documents[0]
    if "apiVersion" in config:
        return check_manifests(documents, text)
    problems = [*_ray_problems(config), *_open_starts(config), *_open_networks(config)]
    if "aws_secret_access_key" in str(config).lower():
        problems.append("credentials are written in the file: use an instance profile (IamInstanceProfile)")
    return problems, [f"{example} is the example's: put your own" for example in EXAMPLES if example in text]


def _ray_problems(config: dict[str, Any]) -> list[str]:
    """The first problem that Ray itself would report, if any."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        path = ".".join(str(part) for part in error.absolute_path) or "the file"
        return [f"{path}: {error.message}"]
    except Exception as error:  # any other failure of Ray's preparation is the file's fault as well
        return [" ".join(f"{type(error).__name__}: {error}".split())]
    return []


def _open_starts(config: dict[str, Any]) -> Iterator[str]:
    """Start commands without a token, or with a dashboard that other machines can reach."""
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(name) or [] if "ray start" in str(command)]
        if not starts:
            yield f"{name}: no `ray start` in it, so Ray's own would run without a token"
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                yield f"{name}: `ray start` without RAY_AUTH_MODE=token lets anybody submit jobs"
            host = command.partition("--dashboard-host=")[2].split(" ")[0]
            if host and host not in ("127.0.0.1", "localhost"):
                yield f"{name}: the dashboard listens on {host}; make it 127.0.0.1 and tunnel to it"


def _open_networks(config: dict[str, Any]) -> Iterator[str]:
    """Rules of an AWS security group that let the whole world in."""
    provider = config.get("provider") or {}
    if provider.get("type") != "aws":
        return
    rules = (provider.get("security_group") or {}).get("IpPermissions") or []
    if not rules:
        yield "provider.security_group: none, so Ray opens ssh to the world; name your network"
    for address in (address for rule in rules for address in rule.get("IpRanges") or []):
        network = str(address.get("CidrIp"))
        try:
            prefix = ipaddress.ip_network(network).prefixlen
        except ValueError:
            yield f"provider.security_group: {network} is no network; write 198.51.100.0/24"
            continue
        if prefix < 8:
            yield f"provider.security_group: {network} is the whole world; name your network"
