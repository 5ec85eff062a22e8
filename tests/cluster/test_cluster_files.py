"""Contract: cluster.yaml and jobs/cluster/ are valid, require the token and have the versions of constraints.txt."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from vae_ray.version import VERSION

REPOSITORY = Path(__file__).resolve().parents[2]
AWS = REPOSITORY / "cluster.yaml"
OWN_MACHINES = REPOSITORY / "jobs" / "cluster" / "own-machines.yaml"
RAYJOB = REPOSITORY / "jobs" / "cluster" / "rayjob.yaml"
FIELDS = Path(__file__).with_name("rayjob_fields.yaml")
FILES = [AWS, OWN_MACHINES, RAYJOB]
FOR_RAY_UP = [AWS, OWN_MACHINES]


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def pinned(package: str) -> str:
    line = re.search(rf"^{package}==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    assert line
    return line[1]


def validated_by_ray(config: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of `config`; raises if `ray up` would refuse it. The one place that uses this private API."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("file", FOR_RAY_UP, ids=lambda file: file.name)
def test_ray_up_takes_the_file(file: Path) -> None:
    prepared = validated_by_ray(load(file))
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_the_rayjob_has_only_published_fields() -> None:
    manifest, schema = load(RAYJOB), load(FIELDS)
    assert [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(manifest)] == []
    group = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    group["template"]["spec"]["containers"][0]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        jsonschema.validate(manifest, schema)


@pytest.mark.parametrize("file", FOR_RAY_UP, ids=lambda file: file.name)
def test_nodes_start_with_the_token_and_a_dashboard_on_loopback(file: Path) -> None:
    config = load(file)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [config["head_start_ray_commands"], config["worker_start_ray_commands"]]
    for commands in starts:
        assert commands[0] == "ray stop"  # of an earlier `ray up`
        before_ray = commands[-1].split("ray start")[0]
        assert "RAY_AUTH_MODE=token" in shlex.split(before_ray.split("sh -c")[0])
    assert "--dashboard-host=127.0.0.1" in shlex.split(starts[0][-1])
    assert "0.0.0.0" not in str(starts)
    assert any(command.startswith("chmod 600") for command in config["setup_commands"])


def test_versions_are_those_of_constraints_txt() -> None:
    ray, torch = pinned("ray"), pinned("torch")
    texts = {file: file.read_text() for file in FILES}
    images = {image for text in texts.values() for image in re.findall(r"rayproject/ray:\S+", text)}
    assert {image.removesuffix(".") for image in images} >= {
        f"rayproject/ray:{ray}-py311-{kind}" for kind in ("cpu", "gpu")
    }
    assert all(image.startswith(f"rayproject/ray:{ray}-py311-") for image in images)
    assert load(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == ray
    assert set(re.findall(r"torch (\d\S+)\.", texts[AWS])) == {torch}
    assert all("--constraint" in text and "constraints.txt" in text for text in texts.values())
    cluster = load(RAYJOB)["spec"]["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for pod in pods for container in pod["template"]["spec"]["containers"]}
    assert images == {f"vae-ray:{VERSION}", f"vae-ray:{VERSION}-gpu"}


def test_commands_that_the_files_name_exist() -> None:
    for file in FILES:
        for job in re.findall(r"jobs/\w+\.py", file.read_text()):
            assert (REPOSITORY / job).is_file(), f"{file.name}: {job}"
        for mentioned in re.findall(r"jobs/cluster/[\w-]+\.yaml", file.read_text()):
            assert (REPOSITORY / mentioned).is_file(), f"{file.name}: {mentioned}"
    for file in FOR_RAY_UP:
        local = [Path(path) for path in load(file)["file_mounts"].values() if not path.startswith("~")]
        assert all((REPOSITORY / path).is_file() for path in local)
