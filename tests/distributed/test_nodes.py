"""A function on two real nodes, and the check of a storage that they share."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from tests.distributed.heads import Head

pytestmark = pytest.mark.ray

ASKING = """
import json, os, sys
from pathlib import Path
from vae_ray.distributed import nodes
from vae_ray.errors import UserError
import ray

ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
sys.path.insert(0, sys.argv[1] + "/modules")  # after Ray has sent the driver's path to the nodes
import only_here

def who(number):
    import sys
    return number, "torch" in sys.modules

def hangs():
    import time
    time.sleep(100)

def fails():
    raise ValueError("first line\\nsecond line")

def dies():
    import os
    os._exit(1)

def refusal(directory):
    try:
        nodes.check_shared_storage(directory)
    except UserError as error:
        return str(error)

def ask(function, *arguments):
    return [vars(answer) for answer in nodes.on_every_node(function, *arguments)]

directory = Path(sys.argv[1]).absolute()
answers = {
    "who": ask(who, 7),
    "by reference": ask(only_here.function),
    "fails": ask(fails),
    "dies": ask(dies),
    "shared": refusal(directory / "shared"),
    "own": refusal(Path("/proc/self/cwd/own")),
    "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("*")),
}
nodes.ANSWER_SECONDS = 2
answers["hangs"] = ask(hangs)
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
        ("by reference", "RuntimeError: ModuleNotFoundError: No module named 'only_here'"),
        ("hangs", "no answer within 2 s"),
        ("fails", "ValueError: second line"),
        ("dies", "WorkerCrashedError: "),
    ],
)
def test_a_node_that_cannot_answer_has_one_line_of_error(answers: Any, question: str, error: str) -> None:
    for answer in answers[question]:
        assert answer["error"].startswith(error)
        assert "\n" not in answer["error"]
        assert answer["result"] is None


def test_a_directory_that_a_node_does_not_see_is_refused_with_its_address(answers: Any) -> None:
    assert answers["shared"] is None
    (address,) = {answer["address"] for answer in answers["who"]}
    assert answers["own"].startswith(
        f"run.storage: got '/proc/self/cwd/own', which not all nodes of the cluster share: {address} cannot see it"
    )
    assert "s3://" in answers["own"]


def test_nothing_is_left_in_the_storage(answers: Any) -> None:
    assert answers["files"] == ["modules", "modules/only_here.py", "own", "shared"]
