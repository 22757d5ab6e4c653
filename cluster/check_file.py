"""Checks of a cluster file before a machine is started: Ray's own schema, and what keeps strangers out."""

from __future__ import annotations

import ipaddress
import logging
from pathlib import Path
from typing import Any

import yaml

from cluster.check_kubernetes import check_manifests
from cluster.session import SessionError

# Of the shipped ray_cluster.yaml: addresses and accounts that belong to nobody.
EXAMPLES = ("203.0.113.0/24", "123456789012")


def check_cluster_file(path: Path) -> tuple[list[str], list[str]]:
    """Everything wrong with a file for ``ray up`` or KubeRay, and what is still as in the example; a line each.

    Raises:
        SessionError: no such file, or no YAML.
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
        where = f" at line {mark.line + 1}" if mark else ""
        raise SessionError(f"{path}: not YAML{where}: {getattr(error, 'problem', error)}; correct it there") from error
    if not documents or not all(isinstance(document, dict) for document in documents):
        raise SessionError(f"{path}: a cluster file is a table of settings; see ray_cluster.yaml")
    config = documents[0]
    if "apiVersion" in config:
        return check_manifests(documents, text)
    problems = [*_schema(config), *_doors(config)]
    unchanged = [f"{example} is the example's: put your own" for example in EXAMPLES if example in text]
    return problems, unchanged


def _schema(config: dict[str, Any]) -> list[str]:
    """What Ray itself would refuse."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        place = ".".join(str(part) for part in error.absolute_path) or "the file"
        return [f"{place}: {error.message}"]
    except Exception as error:  # whatever else Ray's preparation stumbles over is the file's fault as well
        return [" ".join(f"{type(error).__name__}: {error}".split())]
    return []


def _doors(config: dict[str, Any]) -> list[str]:
    """What Ray would take, and strangers too."""
    problems = []
    for where in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in config.get(where) or [] if "ray start" in str(command)]
        if not starts:
            problems.append(f"{where}: no `ray start` in it, so Ray's own would run without a token")
        for command in starts:
            if "RAY_AUTH_MODE=token" not in command:
                problems.append(f"{where}: `ray start` without RAY_AUTH_MODE=token lets anybody submit jobs")
            host = command.partition("--dashboard-host=")[2].split(" ")[0]
            if host and host not in ("127.0.0.1", "localhost"):
                problems.append(f"{where}: the dashboard listens on {host}; make it 127.0.0.1 and tunnel to it")
    provider = config.get("provider") or {}
    if provider.get("type") == "aws":
        rules = (provider.get("security_group") or {}).get("IpPermissions")
        if not rules:
            problems.append("provider.security_group: none, so Ray opens ssh to the world; name your network")
        for rule in rules or []:
            for address in rule.get("IpRanges") or []:
                network = str(address.get("CidrIp"))
                try:
                    wide = ipaddress.ip_network(network).prefixlen < 8
                except ValueError:
                    problems.append(f"provider.security_group: {network} is no network; write 198.51.100.0/24")
                    continue
                if wide:
                    problems.append(f"provider.security_group: {network} is the whole world; name your network")
    if "aws_secret_access_key" in str(config).lower():
        problems.append("credentials are written in the file: use an instance profile (IamInstanceProfile)")
    return problems
