"""Questions to two real nodes: what each answers, whether they share a storage, and what `vae-ray doctor` says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.heads import Head, doctor, levels, text

pytestmark = pytest.mark.ray

ASKING = """
import json, os, sys
from pathlib import Path
from vae_ray.distributed import nodes
from vae_ray.errors import UserError
import ray

ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
sys.path.insert(0, sys.argv[1] + "/modules")  # after Ray has told the nodes where the driver looks
import only_here

def who(number):
    import sys
    return number, "torch" in sys.modules

def absent():
    import a_module_that_is_nowhere

def hangs():
    import time
    time.sleep(100)

def fails():
    raise ValueError("first line\\nsecond")

def dies():
    import os
    os._exit(1)

def refusal(directory):
    try:
        nodes.check_storage(directory)
    except UserError as error:
        return str(error)

def ask(function, *arguments, **options):
    return [vars(answer) for answer in nodes.on_every_node(function, *arguments, **options)]

directory = Path(sys.argv[1]).absolute()
answers = {
    "who": ask(who, 7),
    "absent": ask(absent),
    "by reference": ask(only_here.function),
    "hangs": ask(hangs, timeout_seconds=2),
    "fails": ask(fails),
    "dies": ask(dies),
    "shared": refusal(directory / "shared"),
    "own": refusal(Path("/proc/self/cwd/own")),
    "left": sorted(str(path.relative_to(directory)) for path in directory.rglob("*")),
}
(directory / "answers.json").write_text(json.dumps(answers))  # Ray itself prints, of a worker that died for instance
"""


@pytest.fixture(scope="module")
def answers(two_nodes: Head, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What one driver on the head learns, asking everything once."""
    directory = tmp_path_factory.mktemp("driver")
    (directory / "modules").mkdir()
    (directory / "modules" / "only_here.py").write_text("def function():\n    return 1\n")
    environment = {"RAY_ADDRESS": two_nodes.gcs, "PYTHONDONTWRITEBYTECODE": "1"}
    # the driver's working directory is another one than that of the nodes: /proc/self/cwd differs
    done = two_nodes.run(sys.executable, "-c", ASKING, str(directory), cwd=directory, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "answers.json").read_text())


def test_every_node_answers_without_torch(answers: Any) -> None:
    assert [answer["result"] for answer in answers["who"]] == [[7, False], [7, False]]
    assert [answer["error"] for answer in answers["who"]] == [None, None]
    assert len({answer["node_id"] for answer in answers["who"]}) == 2
    assert sorted(answer["resources"]["CPU"] for answer in answers["who"]) == [1, 2]


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ("absent", "Python there has no module 'a_module_that_is_nowhere': install it on that node, or"),
        ("by reference", "Python there has no module 'only_here': install it on that node, or"),
        ("hangs", "no answer within 2 s"),
        ("fails", "ValueError: first line"),
        ("dies", "WorkerCrashedError: "),
    ],
)
def test_a_node_that_cannot_answer_says_why_in_one_line(answers: Any, question: str, error: str) -> None:
    for answer in answers[question]:
        assert answer["error"].startswith(error)
        assert "\n" not in answer["error"]
        assert answer["result"] is None


def test_a_directory_that_all_nodes_see_is_a_storage(answers: Any) -> None:
    assert answers["shared"] is None


def test_a_directory_that_a_node_does_not_see_is_refused_with_its_address(answers: Any) -> None:
    (address,) = {answer["address"] for answer in answers["who"]}
    assert answers["own"].startswith(
        f"run.storage: got '/proc/self/cwd/own', which not all nodes of the cluster share: {address} cannot see it"
    )
    assert "s3://" in answers["own"]


def test_nothing_is_left_in_the_storage(answers: Any) -> None:
    assert answers["left"] == ["modules", "modules/only_here.py", "own", "shared"]


@pytest.mark.parametrize("way", ["by a job", "as a node"])
def test_a_healthy_cluster_of_two_nodes(two_nodes: Head, tmp_path: Path, way: str) -> None:
    address = two_nodes.dashboard if way == "by a job" else two_nodes.gcs
    code, answer = doctor(two_nodes, "--address", address, "--storage", str(tmp_path / "runs"))
    assert code == 0
    assert answer["healthy"] is True
    assert "error" not in levels(answer).values()
    expected = {"nodes", "versions", "vae_ray", "clocks", "token", "dashboard", "storage", "data cache", "/dev/shm"}
    assert {subject for subject, level in levels(answer).items() if level == "ok"} >= expected
    assert len(answer["nodes"]) == 2
    assert sorted(node["resources"]["CPU"] for node in answer["nodes"]) == [1, 2]
    assert "writable from every node" in text(answer, "storage")
    assert not (tmp_path / "runs").exists()  # a question leaves nothing
