"""cluster.yaml, by Ray's own schema and preparation, and by a stand-in for AWS's EC2."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws import config as aws_config
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from jobs.device_tables import load_prices
from tests.builders import REPOSITORY

FILE = REPOSITORY / "cluster.yaml"
GPUS = {"h100": 8, "h200": 8, "l40s": 4, "l4": 4}


@pytest.fixture
def config() -> Any:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty account, and a home for the key that Ray makes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with mock_aws():
        yield


def test_ray_accepts_and_prepares_it(config: Any) -> None:
    prepared = prepare_config(config)
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert set(types) == {"head", "cpu", *GPUS}
    assert prepared["head_node_type"] == "head"
    assert all(kind["min_workers"] == 0 for kind in types.values()), "the user chooses"
    assert types["head"]["max_workers"] == 0
    assert sum(kind["max_workers"] > 0 for kind in types.values()) == 5


def test_an_unknown_key_would_be_refused(config: Any) -> None:
    config["available_node_types"]["cpu"]["min_worker"] = 1
    with pytest.raises(Exception, match="min_worker"):
        validate_config(prepare_config(config))


def test_resources_are_those_of_the_machines(config: Any, aws: None) -> None:
    """No more CPUs and GPUs than the instance type has, two cores a GPU left, memory likewise."""
    prepared = prepare_config(config)
    bare = yaml.safe_load(FILE.read_text())
    for kind in bare["available_node_types"].values():
        kind["resources"] = {}
    known = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(bare))
    for name, kind in prepared["available_node_types"].items():
        machine = known["available_node_types"][name]["resources"]
        asked = kind["resources"]
        gpus = GPUS.get(name, 0)
        assert machine.get("GPU", 0) == asked.get("GPU", 0) == gpus
        if name == "head":
            assert asked["CPU"] == 0
            continue
        assert asked["CPU"] == machine["CPU"] - 2 * max(1, gpus)
        memory = machine["memory"] / 0.7  # Ray counts 30 % of it for its object store
        assert asked["object_store_memory"] <= 0.26 * memory


def test_a_plan_reckons_with_the_cpus_that_ray_is_given(config: Any) -> None:
    prices = load_prices(None).devices
    kinds = config["available_node_types"]
    assert {name.upper() for name in GPUS} <= prices.keys()
    for name, gpus in GPUS.items():
        price = prices[name.upper()]
        assert price.cores == kinds[name]["resources"]["CPU"] / gpus
        assert price.instance == kinds[name]["node_config"]["InstanceType"]


def test_workers_are_spot_and_keyless_and_the_head_is_not_spot(config: Any) -> None:
    for name, kind in config["available_node_types"].items():
        node = kind["node_config"]
        profile = "tessera-head" if name == "head" else "tessera-worker"
        assert node["IamInstanceProfile"] == {"Name": profile}
        assert ("InstanceMarketOptions" in node) == (name != "head")
        assert node["MetadataOptions"] == {"HttpTokens": "required"}
        (disk,) = node["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= (200 if name == "head" else 500)
    assert "AWS_" not in FILE.read_text()


def test_aws_set_up_opens_ssh_and_nothing_else(config: Any, aws: None) -> None:
    import boto3

    ready = aws_config.bootstrap_aws(prepare_config(config))
    groups = set()
    for kind in ready["available_node_types"].values():
        node = kind["node_config"]
        assert node["SubnetIds"]
        assert node["KeyName"] == "ray-autoscaler_us-east-1"
        assert node["ImageId"] == "ami-00000000000000000", "for the user to set"
        groups |= set(node["SecurityGroupIds"])
    (group,) = groups
    found = boto3.resource("ec2", region_name="us-east-1").SecurityGroup(group)
    assert found.group_name == "tessera"
    within, ssh = sorted(found.ip_permissions, key=lambda rule: str(rule["IpProtocol"]))
    assert [pair["GroupId"] for pair in within["UserIdGroupPairs"]] == [group]
    assert within["IpRanges"] == []
    assert (ssh["FromPort"], ssh["ToPort"], ssh["IpProtocol"]) == (22, 22, "tcp")
    assert boto3.client("iam").list_instance_profiles()["InstanceProfiles"] == [], "made none"


@pytest.mark.parametrize("which", ["head", "worker"])
def test_ray_understands_how_it_is_started(config: Any, which: str) -> None:
    command = config[f"{which}_start_ray_commands"][-1]
    words = shlex.split(command[command.index("ray start") :])
    options = start.make_context("ray start", words[2:]).params
    assert (options["head"], options["metrics_export_port"]) == (which == "head", 8080)
    assert options["object_spilling_directory"].endswith(("ray-spill", "$SPILL"))
    assert "RAY_AUTH_MODE=token" in command
    if which == "head":
        assert options["dashboard_host"] == "127.0.0.1"
        assert (options["num_cpus"], options["num_gpus"]) == (0, 0)


def test_commands_are_shell_and_the_version_stands_once(config: Any) -> None:
    commands = [command for key in config if key.endswith("_commands") for command in config[key]]
    assert len(commands) == 11
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert sum("TESSERA=v" in command for command in commands) == 1
