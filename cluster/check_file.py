"""Checks of a cluster file before a machine is started: Ray's own schema, versions, and whatever lets strangers in."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from cluster.check_aws import aws_problems, gpu_notes
from cluster.check_kubernetes import check_manifests
from cluster.check_versions import open_versions
from cluster.session import SessionError

# In the shipped files; they belong to nobody. Image, security group, network, account, registry, buckets.
EXAMPLES = ("ami-0123456789abcdef0", "sg-0123456789abcdef0", "123456789012", "registry.example.com", "s3://your-")


class Findings(NamedTuple):
    """What `glad cluster check` says of a file, a line each."""

    problems: list[str]
    examples: list[str]  # values of the shipped file that are still in it
    notes: list[str]  # what may be meant


def check_cluster_file(path: Path) -> Findings:
    """What is wrong with a file for ``ray up`` or KubeRay.

    Raises:
        SessionError: no such file, or not YAML.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
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
    examples = [f"{example} is the example's: put your own" for example in EXAMPLES if example in str(documents)]
    if "apiVersion" in documents[0]:
        problems, notes = check_manifests(documents)
        return Findings(problems, examples, notes)
    config = documents[0]
    problems = [*_ray_problems(config), *_open_starts(config), *aws_problems(config), *_missing_files(config)]
    problems += open_versions(_with_defaults(config), partial(find_file, config))
    if "aws_secret_access_key" in str(config).lower():
        problems.append("credentials are written in the file: use an instance profile (IamInstanceProfile)")
    return Findings(problems, examples, list(gpu_notes(config)))


def _ray_problems(config: dict[str, Any]) -> list[str]:
    """The first problem that Ray itself would report, if any."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):  # warnings of what Docker might not like, without Docker as well
            validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        path = ".".join(str(part) for part in error.absolute_path) or "the file"
        return [f"{path}: {error.message}"]
    except Exception as error:  # any other failure of Ray's preparation is the file's fault as well
        return [" ".join(f"{type(error).__name__}: {error}".split())]
    return []


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """The file with whatever Ray fills in, such as commands that install packages where the file has none."""
    from ray.autoscaler._private.util import fillout_defaults

    try:
        return fillout_defaults(config)
    except Exception:  # `_ray_problems` says why
        return config


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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


def _missing_files(config: dict[str, Any]) -> Iterator[str]:
    """Files to bring to the machines that are not here; Ray fails at them without saying so in words."""
    for remote, local in _table(config.get("file_mounts")).items():
        if not Path(str(local)).expanduser().exists():
            advice = "ray get-auth-token --generate" if "auth_token" in str(local) else "give the command in its folder"
            yield f"file_mounts.{remote}: no {local} here ({advice})"


def find_file(config: dict[str, Any], path: str) -> Path | None:
    """Where a file that the file_mounts bring to a machine's ``path`` is here; None if they do not."""
    home = f"/home/{_table(config.get('auth')).get('ssh_user', 'ubuntu')}"

    def absolute(remote: str) -> PurePosixPath:
        return PurePosixPath(re.sub(r"^(~|\$HOME|\$\{HOME\})(?=/|$)", home, remote))

    for remote, local in _table(config.get("file_mounts")).items():
        if absolute(path).is_relative_to(absolute(remote)):
            return Path(str(local)).expanduser() / absolute(path).relative_to(absolute(remote))
    return None
