"""Checks of a file for ``ray up`` on AWS: what Ray would choose by itself, open networks, and the GPUs to come."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from typing import Any

from cluster.session import GPUS_TO_COME

STACK = "cluster/aws_stack.yaml makes it"
IMAGE_ADVICE = "name an image of your region (ray_cluster.yaml has the command that finds it)"
IMAGE_ID = re.compile(r"ami-[0-9a-f]{8}([0-9a-f]{9})?")
# GPUs of a machine by its size, with one in all other sizes; and families that have as many in their largest size.
GPUS = {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8, "metal": 8, "p3.8xlarge": 4, "p3.16xlarge": 8}
GPUS |= dict.fromkeys(("p3dn.24xlarge", "p4d.24xlarge", "p4de.24xlarge"), 8)
KNOWN = re.compile(r"(g4dn|g5|g6|g6e|gr6|p3|p3dn|p4d|p4de|p5|p5e|p5en|p6-b\d+)\.")
WITH_GPU = re.compile(r"[gp]\d|gr\d")


def aws_problems(config: dict[str, Any]) -> Iterator[str]:
    """Whatever lets strangers in, and what Ray fills in by itself to the user's harm; nothing if this is not AWS."""
    provider = config.get("provider") or {}
    if provider.get("type") != "aws":
        return
    try:
        import boto3  # noqa: F401
    except ImportError:
        yield "boto3 is missing, with which Ray starts machines on AWS: pip install 'glad-ray[aws]'"
    for name, node_type in (config.get("available_node_types") or {}).items():
        node = (node_type or {}).get("node_config") or {}
        if "LaunchTemplate" in node:
            continue  # whatever is left out here may be in there
        place, image = f"available_node_types.{name}.node_config", str(node.get("ImageId") or "")
        if image.lower() in ("", "latest_dlami"):
            yield f"{place}.ImageId: {image or 'none'}, for which Ray takes an image with Python 3.6: {IMAGE_ADVICE}"
        elif not IMAGE_ID.fullmatch(image):
            yield f"{place}.ImageId: {image} is no id of an image: {IMAGE_ADVICE}"
        if not node.get("SecurityGroupIds") and "NetworkInterfaces" not in node:
            yield f"{place}.SecurityGroupIds: none, so Ray makes a group that opens ssh to the whole world ({STACK})"
        if "IamInstanceProfile" not in node:
            yield f"{place}.IamInstanceProfile: none, so the machine gets no rights, or Ray's wide ones ({STACK})"
    yield from _open_networks(provider)


def _open_networks(provider: dict[str, Any]) -> Iterator[str]:
    """Rules of the file's own security group that let the whole world in."""
    rules = (provider.get("security_group") or {}).get("IpPermissions") or []
    ranges = [(rule.get("IpRanges") or [], "CidrIp") for rule in rules]
    ranges += [(rule.get("Ipv6Ranges") or [], "CidrIpv6") for rule in rules]
    for network in (str(address.get(key)) for addresses, key in ranges for address in addresses):
        try:
            prefix = ipaddress.ip_network(network).prefixlen
        except ValueError:
            yield f"provider.security_group: {network} is no network; write 198.51.100.0/24"
            continue
        if prefix < 8:
            yield f"provider.security_group: {network} is the whole world; name your network"


def gpu_notes(config: dict[str, Any]) -> Iterator[str]:
    """A line if the GPUs that the head declares are not those that may come."""
    types = dict(config.get("available_node_types") or {})
    head = types.pop(config.get("head_node_type"), None) or {}
    declared = (head.get("resources") or {}).get(GPUS_TO_COME, 0)
    left = config.get("max_workers", 2)
    most = 0
    unknown: list[str] = []
    by_gpus = sorted(((_gpus(node or {}), node or {}) for node in types.values()), key=lambda pair: -(pair[0] or 0))
    for gpus, node in by_gpus:
        if gpus is None:
            unknown.append(str(node["node_config"]["InstanceType"]))
            continue
        count = min(left, node.get("max_workers", left))
        most, left = most + count * gpus, left - count
    if unknown:
        yield f"{GPUS_TO_COME} is {declared}: see that it is the GPUs of all {', '.join(unknown)} that may come"
    elif declared != most:
        yield gpus_differ(declared, most)


def gpus_differ(declared: int, most: int) -> str:
    """One line about a head that promises other than the GPUs that may come."""
    waits = "more actors wait than ever start" if declared > most else "`glad` plans for fewer than may come"
    return (
        f"{GPUS_TO_COME} of the head is {declared}, but {most} GPUs may come (max_workers), so {waits}; make it {most}"
    )


def _gpus(node: dict[str, Any]) -> int | None:
    """GPUs of a machine, known by what the file says or by its name; None if neither is known."""
    stated = (node.get("resources") or {}).get("GPU")
    name = str((node.get("node_config") or {}).get("InstanceType", ""))
    if stated is not None or not WITH_GPU.match(name):
        return int(stated or 0)
    return GPUS.get(name, GPUS.get(name.partition(".")[2], 1)) if KNOWN.match(name) else None
