"""The Experiment: one frozen, validated description of a run, and the one language that overrides it.

Data flow: preset or YAML file + overrides -> `Experiment` -> everything else. Light (no torch, no ray): the command
line builds its help from it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vae_ray.config import keys
from vae_ray.config.fields import Section
from vae_ray.config.migration import migrated
from vae_ray.config.sections.data import Data, DigitsData
from vae_ray.config.sections.likelihoods import BernoulliLikelihood, Likelihood
from vae_ray.config.sections.model import ModelConfig
from vae_ray.config.sections.objectives import ElboObjective, Objective
from vae_ray.config.sections.optim import OptimConfig
from vae_ray.config.sections.run import RunConfig
from vae_ray.config.sections.training import TrainingConfig
from vae_ray.config.sections.workers import WorkersConfig
from vae_ray.errors import UserError
from vae_ray.storage.locations import local_path
from vae_ray.storage.reading import format_yaml, read_yaml

PRESET_DIR = Path(__file__).parent / "presets"


class Experiment(Section):
    """Everything that determines a run; frozen plain data.

    Build one with `Experiment.preset(name)`, `Experiment.from_file(path)` or keyword sections, and vary it
    with `with_overrides({"optim.lr": 3e-4, "model.network": "ladder"})`.
    """

    data: Data = DigitsData()
    model: ModelConfig = ModelConfig()
    likelihood: Likelihood = BernoulliLikelihood()
    objective: Objective = ElboObjective()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def preset(cls, name: str) -> Experiment:
        """The preset of that name; raises `UserError` with the nearest real name if there is none."""
        if name not in preset_names():
            raise UserError(f"preset {name!r} does not exist; {keys.did_you_mean(name, preset_names())}")
        return cls.from_file(PRESET_DIR / f"{name}.yaml")

    @classmethod
    def from_file(cls, path: str | Path) -> Experiment:
        """An experiment from YAML sections; raises `UserError` if it cannot be read or is not valid."""
        content = read_yaml(local_path(path, key="experiment"), label=str(path))
        return cls.from_dict({} if content is None else content, origin=str(path))

    @classmethod
    def from_dict(cls, sections: object, *, origin: str = "experiment") -> Experiment:
        """An experiment from nested plain data, of this version or of 0.1; missing keys take their defaults."""
        if not isinstance(sections, Mapping):
            raise UserError(f"{origin}: must be a mapping of sections ({', '.join(cls.model_fields)})")
        # its text is text: a quoted '010' stays so
        return cls()._with(migrated({str(key): value for key, value in sections.items()}), reads_text=False)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Experiment:
        """A copy with dotted keys replaced, as in `{"optim.lr": 3e-4, "model.latent-dim": "8"}`.

        Strings are read as the field's type; everything is validated again. Raises `UserError` naming the
        key, the value received, what is allowed and the nearest real key.
        """
        return self._with(overrides, reads_text=True)

    def _with(self, overrides: Mapping[str, Any], *, reads_text: bool) -> Experiment:
        tree = self.model_dump()
        keys.apply_overrides(Experiment, tree, overrides, reads_text=reads_text)
        try:
            return Experiment.model_validate(tree)
        except ValidationError as error:
            raise UserError(keys.explain(error, Experiment)) from None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data (JSON and YAML types only), complete with defaults."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML that `from_file` reads back as an equal experiment."""
        return format_yaml(self.to_dict())

    def flat(self) -> dict[str, Any]:
        """`{"data.source": "digits", "model.network.name": "mlp", ...}` in plain data."""
        return keys.flattened(self.to_dict())

    @property
    def split_seed(self) -> int:
        """The seed that `data.split_seed` means."""
        return self.run.seed if self.data.split_seed == "auto" else self.data.split_seed

    def user_code(self) -> list[str]:
        """The import paths of a user's own code that this experiment names."""
        sections = (self.data.source, self.model.network.name, self.model.prior.name, self.likelihood.name)
        return [path for path in (*sections, self.objective.name, *self.run.callbacks) if ":" in path]


def field_docs() -> Iterator[keys.FieldDoc]:
    """Every dotted key of the Experiment with its type, default and sentence of documentation."""
    return keys.field_docs(Experiment)


@functools.cache
def _docs_by_key() -> dict[str, keys.FieldDoc]:
    """The fields by all of their keys."""
    docs = {key: doc for doc in field_docs() for key in (doc.key, doc.flat_key)}
    return docs | {doc.flat_key.rpartition(".")[0]: doc for doc in field_docs() if doc.is_axis}


def is_place_key(key: str) -> bool:
    """Whether a dotted key says where, by whom or how carefully a run is computed, and not what it computes."""
    doc = _docs_by_key().get(key)
    return doc is not None and doc.is_place


def canonical_key(key: str) -> str:
    """A dotted key as `Experiment.flat` names it, such as `model.network.name` for `model.network`."""
    key = key.replace("-", "_")
    doc = _docs_by_key().get(key)
    return key if doc is None else doc.flat_key


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def differing_fields(old: Experiment, new: Experiment, *, content_only: bool = False) -> list[str]:
    """Readable `key: old -> new` lines for every field in which two experiments differ."""
    before, after = old.flat(), new.flat()
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key) and not (content_only and is_place_key(key))
    ]
