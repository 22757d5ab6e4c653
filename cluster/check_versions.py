"""Checks of what machines install when they start: one that joins next month must get the versions of the others."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import InvalidRequirement, Requirement

LOCK = "requirements.lock"
ADVICE = f"write its version (==), or install -r {LOCK}"
IMAGES = ("image", "head_image", "worker_image")  # keys of a cluster file
MOVING = re.compile(r"\b(latest|nightly|master|main|stable|edge|dev)\b")  # tags of images, parts of addresses
SEPARATORS = frozenset("();<>|&")  # of shell commands
INSTALLERS = {"pip", "uv", "uvx", "conda", "mamba", "micromamba", "pipx", "poetry"}
CONDA = {"conda", "mamba", "micromamba"}
VERBS = {"install", "add", "create", "update", "upgrade", "sync", "run", "inject"}
CONSTRAINTS = {"-c", "--constraint", "--constraints"}  # the first is a channel of conda's
FILES = {"-r", "--requirement", "--requirements", *CONSTRAINTS}
WITH_VALUE = {  # options whose next word is no package
    *("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--index", "--default-index", "--cache-dir"),
    *("-t", "--target", "-p", "--python", "--prefix", "--root", "--python-version", "--platform", "--timeout"),
    *("--python-platform", "--torch-backend", "--only-binary", "--no-binary", "--upgrade-strategy", "--proxy"),
    *("-n", "--name", "--channel", "--file", "--trusted-host", "--progress-bar", "--retries", *FILES),
}
Find = Callable[[str], Path | None]


def open_versions(config: Any, find: Find = lambda path: None) -> Iterator[str]:
    """What a cluster file installs or runs without naming its exact version; a line each, with its place.

    Covers commands wherever they are in the file (pip, uv, conda, pipx, poetry), images, and runtime environments. Not
    packages of the operating system: the machine's image decides on those.

    Args:
        config: a document of the file.
        find: where a file of requirements that a machine reads is here; None if that is not known.
    """
    for place, name, value in _texts(config):
        lines: Iterator[str]
        if name in IMAGES:
            lines = open_image(value)
        elif name == "runtimeEnvYAML":
            lines = _open_environment(value)
        else:
            lines = open_commands(value, find)
        yield from (f"{place}: {line}" for line in lines)


def _texts(value: Any, place: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Place, last key and content of every text in a document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, f"{place}.{key}".lstrip("."), str(key))
    elif isinstance(value, list):
        if name in ("command", "args") and all(isinstance(word, str) for word in value):
            value = value if len(value) == 1 else [shlex.join(value)]  # the words of one command of a container
        for item in value:
            yield from _texts(item, place, name)
    elif isinstance(value, str):
        yield place, name, value


def open_image(image: str) -> Iterator[str]:
    """A line if this name of an image can mean another image tomorrow."""
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and (not tag or MOVING.search(tag)):
        yield f"the image {image} is another one tomorrow: write a tag with its version"


def _open_environment(text: str) -> Iterator[str]:
    """Packages of a runtime environment, given as YAML, that are not pinned."""
    try:
        environment = yaml.safe_load(text)
    except yaml.YAMLError:
        yield "not YAML; correct it there"
        return
    for place, name, package in _texts(environment):
        in_conda = name == "dependencies"
        if (in_conda and not _is_pinned_in_conda(package)) or (
            name in ("pip", "uv", "packages") and not is_pinned(package)
        ):
            yield f"{place}: {package}: {ADVICE}"


def open_commands(text: str, find: Find) -> Iterator[str]:
    """Packages that shell commands install without an exact version; a line each."""
    for line in text.replace("\\\n", " ").replace("`", ";").splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.commenters, lexer.whitespace_split = "", True
            words = list(takewhile(lambda word: not word.startswith("#"), lexer))
        except ValueError:  # an apostrophe in a sentence
            words = line.split()
        command: list[str] = []
        for word in [*words, ";"]:
            if not set(word) <= SEPARATORS:
                command.append(word)
            elif command:
                yield from _of_command(command, find)
                command = []


def _of_command(words: list[str], find: Find) -> Iterator[str]:
    for word in words:
        if len(words) > 1 and " " in word:  # bash -c "pip install ray"
            yield from open_commands(word, find)
        if "://" in word and words[0] in ("curl", "wget") and MOVING.search(word):
            yield f"{word} is another file tomorrow: write an address with a version"
    names = [re.sub(r"^pip[\d.]+$", "pip", word.rpartition("/")[2]) for word in words]
    start = next((index for index, name in enumerate(names) if name in INSTALLERS), len(names))
    verb = next((index for index in range(start, len(names)) if names[index] in VERBS), None)
    if verb is None:
        return
    installer = "pip" if "pip" in names[start:verb] else names[start]  # uv pip install
    options, files, packages = _split(words[verb + 1 :], installer in CONDA)
    if names[verb] in ("sync", "run") and installer == "uv":
        if not {"--frozen", "--locked"} & options:
            yield f"`uv {names[verb]}` may choose other versions tomorrow: add --locked"
        return
    files += packages if names[verb] == "sync" else []  # uv pip sync
    for file in files:
        yield from _open_file(file, find)
    if names[verb] == "sync" or CONSTRAINTS & options:
        return
    for package in packages:
        yield from _open_package(package, installer, bool(files) or "--no-deps" in options)


def _split(words: list[str], conda: bool) -> tuple[set[str], list[str], list[str]]:
    """Options, files of requirements, and packages in the words after ``install``."""
    options: set[str] = set()
    files: list[str] = []
    packages: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name[:2] in ("-r", "-c") and len(name) > 2:  # -rrequirements.txt
            name, equals, value = name[:2], "=", name[2:]
        if not word.startswith("-"):
            packages.append(word)
        elif name in WITH_VALUE:
            value = value if equals else next(rest, "")
            if name in FILES and not conda:
                files.append(value)
                options.add(name)
        else:
            options.add(name)
    return options, files, packages


def _open_package(package: str, installer: str, closed: bool) -> Iterator[str]:
    """A line if this word of a command leaves a version open.

    Args:
        closed: what a local folder depends on is left out, or a file says its versions.
    """
    if installer in CONDA:
        if not _is_pinned_in_conda(package):
            yield f"{package}: write its version, as in {package}=1.2.3"
    elif package.startswith((".", "/", "~", "$")):
        if not closed:
            yield f"{package} brings packages of any version: install -r {LOCK} first, then {package} with --no-deps"
    elif not is_pinned(package):
        yield f"{package}: {ADVICE}"


def is_pinned(package: str) -> bool:
    """Whether this name of a package, as pip takes it, means one version alone."""
    if "git+" in package:
        return bool(re.search(r"@[0-9a-f]{40}\b", package))
    if "://" in package:
        return not MOVING.search(package)
    if package.endswith(".whl"):
        return True
    try:
        versions = Requirement(package).specifier
    except InvalidRequirement:
        return False
    return any(version.operator in ("==", "===") and "*" not in version.version for version in versions)


def _is_pinned_in_conda(package: str) -> bool:
    return bool(re.fullmatch(r"[^<>=!~*]+==?[^<>=!~*]+", package))


def _open_file(path: str, find: Find) -> Iterator[str]:
    local = find(path)
    if local is None:
        yield f"{path} cannot be checked here: bring {LOCK} to the machine by file_mounts, or put it into the image"
    else:
        yield from check_lock(local)


def check_lock(path: Path) -> Iterator[str]:
    """What is wrong with a file of locked requirements; a line each.

    No such file; versions left open; folders of this machine; builds without GPU.
    """
    try:
        lines = path.read_text().replace("\\\n", " ").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        yield f"{path}: {getattr(error, 'strerror', None) or 'not text'}; `make lock` makes it"
        return
    for line in lines:
        package = re.split(r"(?:^|\s)(?:#|--hash)", line)[0].strip()
        if not package or package.startswith("--"):
            continue
        if package.startswith(("-e", ".", "/", "file:")) or " @ file:" in package:
            yield f"{path}: {package} is a folder of one machine; `make lock` makes a file for the cluster"
        elif not is_pinned(package):
            yield f"{path}: {package} leaves the version open; `make lock` makes a file for the cluster"
        elif "+cpu" in package:
            yield f"{path}: {package} is built for machines without a GPU; `make lock` makes a file for the cluster"
