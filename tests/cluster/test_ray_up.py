"""`ray up` with the shipped file, against an AWS that runs in this process: Ray's own code, boto3 and HTTP."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"  # whatever asks for another address than this AWS fails
PROGRAM = (
    '#!/bin/sh\necho "$0 $@" >> "$LOG"\nfor word; do case $word in /*bootstrap-*) cp "$word" "$COPY";; esac; done\n'
)

pytestmark = pytest.mark.slow


@pytest.fixture
def aws(monkeypatch, tmp_path):
    """boto3's sessions lead to moto; ssh and rsync are programs that note what they are given."""
    from moto.ec2.models import instance_types
    from moto.server import ThreadedMotoServer

    # Ray asks for the sizes of all machines that there are, which takes moto a while.
    few = {name: size for name, size in instance_types.INSTANCE_TYPES.items() if name.startswith(("m6i.", "g5."))}
    monkeypatch.setattr(instance_types, "INSTANCE_TYPES", few)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    home, programs = tmp_path / "my home", tmp_path / "programs"
    for folder in (home / ".ray", programs):
        folder.mkdir(parents=True)
    (home / ".ray/auth_token").write_text("x" * 32)
    for name in ("ssh", "rsync"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HTTP_PROXY": NOWHERE,
        "HTTPS_PROXY": NOWHERE,
        "NO_PROXY": "127.0.0.1",
        "HOME": str(home),
        "PATH": f"{programs}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "COPY": str(tmp_path / "bootstrap.yaml"),
    }.items():
        monkeypatch.setenv(name, value)
    yield address
    server.stop()


def stack():
    """Makes what cluster/aws_stack.yaml describes; returns the id of its security group."""
    import boto3

    cloudformation = boto3.client("cloudformation")
    cloudformation.create_stack(
        StackName="glad-ray",
        TemplateBody=(ROOT / "cluster/aws_stack.yaml").read_text(),
        Capabilities=["CAPABILITY_NAMED_IAM"],
        Parameters=[
            {"ParameterKey": "Network", "ParameterValue": "198.51.100.0/24"},
            {"ParameterKey": "Buckets", "ParameterValue": "photos,verdicts"},
        ],
    )
    (made,) = cloudformation.describe_stacks(StackName="glad-ray")["Stacks"]
    return made["Outputs"][0]["OutputValue"]


def ray_up(tmp_path, group):
    import boto3

    image = boto3.client("ec2").describe_images()["Images"][0]["ImageId"]
    text = (ROOT / "ray_cluster.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("ami-0123456789abcdef0", image).replace("sg-0123456789abcdef0", group))
    command = [sys.executable, "-m", "ray.scripts.scripts", "up", "--yes", "--no-config-cache", str(path)]
    up = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert up.returncode == 0, up.stdout + up.stderr
    return yaml.safe_load(path.read_text())


def started(types, bundle, count=1, **settings):
    """Machines by kind that Ray's autoscaler starts for ``count`` bundles of resources."""
    from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import ResourceRequestByCount

    configs = {
        name: NodeTypeConfig(
            name, 0, given["max_workers"], priority=given.get("priority", 0), resources=given["resources"]
        )
        for name, given in types.items()
    }
    requests = [ResourceRequestByCount(request=ResourceRequestUtil.make(bundle), count=count)]
    request = SchedulingRequest(True, configs, max_num_nodes=12, resource_requests=requests, **settings)
    return {launch.instance_type: launch.count for launch in ResourceDemandScheduler(None).schedule(request).to_launch}


def instances(client):
    return [machine for reserved in client.describe_instances()["Reservations"] for machine in reserved["Instances"]]


def test_ray_up_makes_what_the_file_says_and_no_more(aws, tmp_path):
    import boto3

    group = stack()
    config = ray_up(tmp_path, group)
    ec2, iam = boto3.client("ec2"), boto3.client("iam")

    # The head: no room for work, rights of its own, encrypted disk, tokens for its metadata, one security group.
    (head,) = instances(ec2)
    assert head["InstanceType"] == config["available_node_types"]["head"]["node_config"]["InstanceType"]
    assert head["IamInstanceProfile"]["Arn"].endswith("/glad-ray-head")
    assert head["MetadataOptions"]["HttpTokens"] == "required"
    assert [given["GroupId"] for given in head["SecurityGroups"]] == [group]
    assert [(disk["Encrypted"], disk["Size"]) for disk in ec2.describe_volumes()["Volumes"]] == [(True, 150)]
    log = (tmp_path / "log").read_text()
    assert """RAY_OVERRIDE_RESOURCES='"'"'{"CPU":0,"memory":0,"gpus_to_come":10}'""" in log

    # A worker, as the head's autoscaler starts it from the file that it got.
    sent = yaml.safe_load((tmp_path / "bootstrap.yaml").read_text())
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(sent["provider"], "glad")
    for name in ("cpu", "gpu_spot", "gpu_on_demand"):
        provider.create_node(sent["available_node_types"][name]["node_config"], {"ray-user-node-type": name}, 1)
    workers = {
        next(tag["Value"] for tag in machine["Tags"] if tag["Key"] == "ray-user-node-type"): machine
        for machine in instances(ec2)
    }
    assert [name for name, machine in workers.items() if machine.get("InstanceLifecycle") == "spot"] == ["gpu_spot"]
    for name in ("cpu", "gpu_spot", "gpu_on_demand"):
        assert workers[name]["IamInstanceProfile"]["Arn"].endswith("/glad-ray-worker")
        assert workers[name]["SecurityGroups"] == head["SecurityGroups"]
    assert sent["available_node_types"]["gpu_spot"]["resources"]["GPU"] == 1  # what Ray asked of EC2

    # What Ray would start for work of each kind, by the sizes that it asked of EC2.
    types = sent["available_node_types"]
    assert started(types, {"CPU": 1, "memory": 1e9}) == {"cpu": 1}
    assert started(types, {"CPU": 1, "GPU": 1}) == {"gpu_spot": 1}
    assert started(types, {"GPU": 1}, recoverable_resource_availabilities={"gpu_spot": 0}) == {"gpu_on_demand": 1}
    assert started(types, {"GPU": 1}, count=50) == {"gpu_spot": 8, "gpu_on_demand": 2}

    # Strangers: no group but the stack's and AWS's own, ssh from one network, all else among the machines.
    groups = {found["GroupId"]: found for found in ec2.describe_security_groups()["SecurityGroups"]}
    assert len([found for found in groups.values() if found["GroupName"] != "default"]) == 1
    ssh, inner = groups[group]["IpPermissions"]
    assert [(ssh["FromPort"], ssh["ToPort"]), ssh["IpRanges"]] == [(22, 22), [{"CidrIp": "198.51.100.0/24"}]]
    assert (inner["IpRanges"], inner["UserIdGroupPairs"][0]["GroupId"]) == ([], group)

    # Rights: two roles and no other; only the head may start machines.
    assert {role["RoleName"] for role in iam.list_roles()["Roles"]} == {"glad-ray-head", "glad-ray-worker"}
    assert iam.list_role_policies(RoleName="glad-ray-worker")["PolicyNames"] == []
    (policy,) = iam.list_attached_role_policies(RoleName="glad-ray-worker")["AttachedPolicies"]
    rights = iam.get_policy_version(PolicyArn=policy["PolicyArn"], VersionId="v1")["PolicyVersion"]["Document"]
    assert [right["Resource"][0] for right in rights["Statement"]] == ["arn:aws:s3:::photos", "arn:aws:s3:::photos/*"]

    # The machine is given the lock before the project, and what it is told is one command after another.
    order = [
        log.index(word) for word in ("requirements.lock ubuntu@", "glad/requirements.lock)", "--no-deps", "ray start")
    ]
    assert order == sorted(order)
    assert "__pycache__" in log


def test_gpus_of_machines_are_those_that_aws_says():
    from moto.ec2.models.instance_types import INSTANCE_TYPES  # as EC2 describes them

    from cluster.check_aws import _gpus

    known = {name: _gpus({"node_config": {"InstanceType": name}}) for name in INSTANCE_TYPES}
    real = {
        name: sum(gpu["Count"] for gpu in described.get("GpuInfo", {}).get("Gpus", []))
        for name, described in INSTANCE_TYPES.items()
    }
    assert {name: (known[name], real[name]) for name in real if known[name] not in (None, real[name])} == {}
    assert len([name for name in real if known[name]]) > 20
