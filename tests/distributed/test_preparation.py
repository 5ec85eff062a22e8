"""A data set that is prepared by Ray tasks: the same files, whatever dies on the way, and errors of one line.

Workers import this module for its sources, so it imports neither torch nor what does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from vae_ray.config.sections.data import ImagesData
from vae_ray.data.decoding import ImageRules
from vae_ray.data.preparation import Plan, Task, prepare, run_task
from vae_ray.data.rows import Part, Rows, Skipped
from vae_ray.data.shards import Description
from vae_ray.data.sources import plan_of
from vae_ray.data.sources.folder import Folder
from vae_ray.distributed import preparation
from vae_ray.distributed.preparation import prepare_on_cluster, run_on_ray
from vae_ray.errors import TrainingFailed, UserError

pytestmark = pytest.mark.ray

NUM_IMAGES = 320
NUM_PARTS = 10
"""Of at least 32 images each."""


class Noting(Folder):
    """Notes each part that is read, beside the folder: the process that does, and whether it has loaded torch."""

    @property
    def notes(self) -> Path:
        return Path(f"{self.location}.notes")

    def read(self, part: Part, rules: ImageRules) -> Rows:
        if part.num > 1:  # not the image that is read in advance
            with self.notes.open("a") as file:
                file.write(f"{part.payload[0].entry.name} {os.getpid()} {'torch' in sys.modules}\n")
            self.before(part)
        return super().read(part, rules)

    def before(self, part: Part) -> None:
        """What happens before a part is read."""

    def noted(self) -> list[list[str]]:
        return [line.split() for line in self.notes.read_text().splitlines()]


class Dying(Noting):
    """The first reader of its second part dies."""

    def before(self, part: Part) -> None:
        if part.payload[0].entry.name != "cat/049.png":
            return
        with contextlib.suppress(FileExistsError):
            Path(f"{self.location}.died").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)


class Slow(Noting):
    def before(self, part: Part) -> None:
        time.sleep(0.6)


class Failing(Slow):
    """Raises at its second part."""

    error: Exception

    def before(self, part: Part) -> None:
        if part.payload[0].entry.name == "cat/049.png":
            raise self.error
        super().before(part)


class Elsewhere(Folder):
    """Whose files only the process that made it can read."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.pid = os.getpid()

    def read(self, part: Part, rules: ImageRules) -> Rows:
        if os.getpid() == self.pid:
            return super().read(part, rules)
        names = [item.entry.name for item in part.payload]
        return Rows([], {}, [Skipped(name, "cannot be read (No such file or directory)") for name in names], Counter())


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of several sizes in two classes; one is truncated."""
    generator = np.random.default_rng(5)
    for number in range(NUM_IMAGES):
        folder = tmp_path / "photos" / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        shape = (9 + number % 4, 14 - number % 5, 3)
        Image.fromarray(generator.integers(256, size=shape, dtype=np.uint8)).save(folder / f"{number:03d}.png")
    (folder / f"{number:03d}.png").write_bytes((folder / f"{number:03d}.png").read_bytes()[:90])
    return tmp_path / "photos"


def plan(source: Folder) -> Plan:
    config = ImagesData(source="folder", root=source.location, image_size=(7, 11))
    return plan_of(config, source)


def prepared_here(source: Folder, directory: Path) -> Description:
    return prepare(plan(source), str(directory), run=lambda tasks: map(run_task, tasks))


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.usefixtures("cluster")
def test_the_files_are_those_of_a_preparation_in_this_process(photos: Path, tmp_path: Path) -> None:
    source, progress = Noting(str(photos)), []
    there = prepare_on_cluster(plan(source), str(tmp_path / "there"), progress=lambda *done: progress.append(done))
    noted = source.noted()
    here = prepared_here(source, tmp_path / "here")
    assert there == here
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert here.num_images("train") + here.num_images("test") == NUM_IMAGES - 1
    assert here.num_skipped == 1
    assert len(progress) == len(noted) == NUM_PARTS
    assert progress[-1] == (NUM_IMAGES, NUM_IMAGES)
    assert str(os.getpid()) not in {pid for _, pid, _ in noted}
    assert {loads_torch for _, _, loads_torch in noted} == {"False"}


@pytest.mark.usefixtures("cluster")
def test_nothing_is_lost_by_the_death_of_a_process(photos: Path, tmp_path: Path) -> None:
    source = Dying(str(photos))
    there = prepare_on_cluster(plan(source), str(tmp_path / "there"))
    assert [name for name, _, _ in source.noted()].count("cat/049.png") == 2
    assert there == prepared_here(Folder(str(photos)), tmp_path / "here")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (UserError("data.root: is wrong"), UserError, "data.root: is wrong"),
        (KeyError("first\nsecond"), TrainingFailed, "could be prepared: KeyError: 'first\\nsecond'; the same command"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_error_is_one_line_and_ends_all_tasks(
    error: Exception, expected: type[Exception], text: str, photos: Path, tmp_path: Path
) -> None:
    source = Failing(str(photos))
    source.error = error
    with pytest.raises(expected) as raised:
        prepare_on_cluster(plan(source), str(tmp_path / "there"))
    assert type(raised.value) is expected
    assert text in str(raised.value)
    assert "\n" not in str(raised.value)
    noted, files = source.noted(), content(tmp_path / "there")
    assert not [name for name in files if name.endswith("nodes.json")]
    time.sleep(0.5)
    assert (source.noted(), content(tmp_path / "there")) == (noted, files)


@pytest.mark.usefixtures("cluster")
def test_the_tasks_end_when_nobody_asks_for_the_next(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preparation, "PATIENCE_SECONDS", 0.1)
    source, described = Slow(str(photos)), plan(Slow(str(photos)))
    others = (described.rules, described.test_fraction, str(tmp_path / "there"), described.key)
    parts = enumerate(source.parts(described.num_rows))
    records = run_on_ray(Task(source, part, number, *others) for number, part in parts)
    assert next(records).num_rows == next(records).num_rows == NUM_IMAGES / NUM_PARTS
    assert [record.getMessage()[:23] for record in caplog.records] == ["no part is done yet: if"]
    records.close()
    noted, files = source.noted(), content(tmp_path / "there")
    assert 2 <= len(noted) < NUM_PARTS
    time.sleep(0.5)
    assert (source.noted(), content(tmp_path / "there")) == (noted, files)


@contextlib.contextmanager
def interrupted_once(is_time: Callable[[], bool]) -> Iterator[None]:
    """Ctrl-C during the body."""

    def interrupt() -> None:
        while not is_time():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.usefixtures("cluster")
def test_what_was_done_before_ctrl_c_is_not_done_again(photos: Path, tmp_path: Path) -> None:
    def records() -> list[str]:
        return sorted(path.name for path in tmp_path.glob("there/part-*-0*.json"))

    with interrupted_once(lambda: len(records()) >= 2), pytest.raises(KeyboardInterrupt):
        prepare_on_cluster(plan(Slow(str(photos))), str(tmp_path / "there"))
    done, source = records(), Slow(str(photos))
    assert 2 <= len(done) < NUM_PARTS
    source.notes.unlink()
    there = prepare_on_cluster(plan(source), str(tmp_path / "there"))
    assert len(source.noted()) == NUM_PARTS - len(done)
    assert there == prepared_here(Folder(str(photos)), tmp_path / "here")
    assert content(tmp_path / "there") == content(tmp_path / "here")


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("joins_late", [False, True])
def test_a_node_that_cannot_read_the_source_does_not_skip_it(
    joins_late: bool, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if joins_late:  # after all nodes were asked
        monkeypatch.setattr(preparation, "_check_nodes", lambda reference, common: None)
    with pytest.raises(UserError, match=r"^data\.root: not all nodes of the cluster can read photos \(folder") as error:
        prepare_on_cluster(plan(Elsewhere(str(photos))), str(tmp_path / "there"))
    assert " cannot read it (cat/001.png: cannot be read (No such file or directory)); try" in str(error.value)
    assert list(tmp_path.glob("there/*")) == []


def test_what_a_node_does_not_see_is_named(photos: Path, tmp_path: Path) -> None:
    """The function that each node runs, in this process."""
    described, out = plan(Folder(str(photos))), tmp_path / "there"
    part = next(described.source.parts(32))
    task = Task(described.source, part, 0, described.rules, described.test_fraction, str(out), described.key)
    first = photos / "cat" / "001.png"
    with preparation._common_to_all(task) as common:
        assert common.part is not None
        assert [item.entry.name for item in common.part.payload] == ["cat/001.png"]
        assert preparation._problem_here(common) is None
        assert len(list(out.iterdir())) == 1, "a node has left its marker"
        content = first.read_bytes()
        Image.new("RGB", (10, 10)).save(first)
        assert preparation._problem_here(common) == (
            "data.root",
            "reads other pixels (other files, or another version of Pillow)",
        )
        first.write_bytes(content)
        (out / common.marker).unlink()
        assert preparation._problem_here(common) == ("--out", "does not see what this process writes there")
        out.rmdir()
        assert preparation._problem_here(common) == ("--out", "does not see what this process writes there")
        assert not out.exists()


def test_a_source_that_is_read_in_this_process_needs_no_ray(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    source = Noting(str(photos))
    source.in_process = True
    monkeypatch.chdir(tmp_path)
    prepare_on_cluster(plan(source), "there")
    assert {pid for _, pid, _ in source.noted()} == {str(os.getpid())}
    assert (tmp_path / "there" / "dataset.json").exists()


def test_a_cluster_without_cpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "Resources": {"memory": 1e9}, "Labels": {}}
    dead = {"Alive": False, "Resources": {"CPU": 4.0}, "Labels": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, dead])
    with pytest.raises(UserError, match="no node of the Ray cluster has a CPU for tasks"):
        preparation._check_has_cpus()
    node["Labels"] = {"ray.io/node-group": "head"}
    preparation._check_has_cpus()
