"""The registry: one YAML file an entry in `entries/`, read and checked. Light: no torch, no ray.

An entry is a published result: which experiments to run, what to measure, and the reference with its source. A new one
is a new file; the contract test (tests/reproduction) finds it by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from vae_ray.config.experiment import Experiment
from vae_ray.config.fields import Section
from vae_ray.config.keys import did_you_mean
from vae_ray.errors import UserError, one_line
from vae_ray.storage.reading import read_yaml

ENTRY_DIR = Path(__file__).parent / "entries"
EPOCHS = "training.epochs"
Overrides = dict[str, Any]
"""Of an experiment, by dotted keys."""


class Target(Section):
    """One number to obtain, and what was published of it."""

    metric: str = Field(pattern="^(train|val|test)/.+$")
    """As `evaluate` names it; with `epoch`, as the records of training do."""
    run: str = ""
    """Of which of the entry's runs."""
    minus: str | None = None
    """The run whose value is subtracted: the difference of two runs is the target."""
    epoch: int | None = None
    reference: float | None = None
    """The published value; None where nothing was published of this stage."""
    tolerance: float | None = Field(None, gt=0)
    """How far from the reference still counts as reproduced."""
    side: Literal["below", "above"] | None = None
    """Instead of a tolerance, where the publication says only on which side of the reference the value is."""
    why: str = ""
    """Where the reference is from, and why this tolerance."""

    @model_validator(mode="after")
    def _has_one_criterion(self) -> Self:
        if [self.tolerance, self.side].count(None) != 1 and self.reference is not None:
            raise ValueError("a reference needs a tolerance or a side, and not both")
        return self


class Evaluation(Section):
    """What `evaluate` is asked for; at most one of each split."""

    metrics: str
    split: Literal["train", "val", "test"] = "test"
    num_samples: int = 5000
    num_images: int | None = None


class Stage(Section):
    """A part of the whole training, or a smaller version of it, that can be run by itself."""

    what: str
    overrides: Overrides = Field(default_factory=dict)
    """On top of the entry's. With `training.epochs` alone, later stages continue the runs of earlier ones."""
    evaluations: tuple[Evaluation, ...] = ()
    minutes: float = Field(gt=0)
    """One seed from the beginning, with its evaluation, on two CPU cores."""
    cost: Literal["measured", "estimated"]
    targets: tuple[Target, ...] = Field(min_length=1)
    not_run: str = ""
    """Why no result of it is in docs/results.md."""

    @property
    def continues(self) -> bool:
        """Whether its run directories are those of the other stages that differ in their epochs alone."""
        return set(self.overrides) <= {EPOCHS}


class Entry(Section):
    """A published result."""

    name: str
    title: str
    source: str
    """Paper and table, or code and log."""
    protocol: str
    """What must be equal for the numbers to compare, and where it is not: images, likelihood, units, network."""
    preset: str
    overrides: Overrides = Field(default_factory=dict)
    runs: dict[str, Overrides] = Field({"": {}}, min_length=1)
    """The overrides of each run, by its name; one without a name where there is nothing to compare."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """The last is the published one."""
    notes: str = ""
    """What is known about deviations."""

    def experiment(self, stage: Stage, run: str, seed: int) -> Experiment:
        """What to train for one run of a stage; raises `UserError`."""
        overrides = {**self.overrides, **stage.overrides, **self.runs[run]}
        name = "-".join([*self._own_directory(stage), *([run] if run else []), f"seed-{seed}"])
        return Experiment.preset(self.preset).with_overrides({**overrides, "run.name": name, "run.seed": seed})

    def _own_directory(self, stage: Stage) -> list[str]:
        return [] if stage.continues else [f"stage-{self.stages.index(stage) + 1}"]

    def minutes(self, stages: list[Stage]) -> float:
        """Expected for one seed, if nothing of them was run before."""
        continued = [stage.minutes for stage in stages if stage.continues]
        return max(continued, default=0.0) + sum(stage.minutes for stage in stages if not stage.continues)

    def chosen_stages(self, text: str | None) -> list[Stage]:
        """Those of "6", "5,6" or "1..6"; None means the last. Raises `UserError`."""
        num = len(self.stages)
        if text is None:
            return [self.stages[-1]]
        numbers: set[int] = set()
        for part in text.split(","):
            first, _, last = part.partition("..")
            if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) < int(first):
                numbers.add(0)
            else:
                numbers |= {int(first), int(last or first)} | set(range(int(first), min(int(last or first), num) + 1))
        if not numbers <= set(range(1, num + 1)):
            raise UserError(
                f"--stages: got {text!r}, {self.name} has the stages 1 to {num}; for example --stages {num}"
            )
        return [self.stages[number - 1] for number in sorted(numbers)]


def entry_names() -> list[str]:
    """Names of all entries."""
    return sorted(path.stem for path in ENTRY_DIR.glob("*.yaml"))


def load_entry(name: str) -> Entry:
    """The entry of that name; raises `UserError` with the nearest real name if there is none."""
    if name not in entry_names():
        raise UserError(f"entry {name!r} does not exist; {did_you_mean(name, entry_names())}")
    file = ENTRY_DIR / f"{name}.yaml"
    content = read_yaml(file, label=str(file))
    try:
        return Entry.model_validate({"name": name, **content})
    except ValidationError as error:
        raise UserError(f"{file}: {one_line(error)}") from None


def all_entries() -> list[Entry]:
    """All entries by name."""
    return [load_entry(name) for name in entry_names()]
