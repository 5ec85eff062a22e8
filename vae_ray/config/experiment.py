"""The Experiment: one frozen, validated description of a run, and the one language that overrides it.

Data flow: preset or YAML file + overrides -> `Experiment` -> everything else. This module is light (no torch,
no ray), because the command line builds its help from it. Tables of networks, likelihoods, sources,
optimizers and schedules live in the files that own them; the `Literal`s below repeat their keys so that
`--help` can list them, and a contract test holds the two equal.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationError,
)

from vae_ray.errors import UserError
from vae_ray.storage.reading import parse_yaml, read_bytes, shown

MOST_WORKERS = 4096
PRESET_DIR = Path(__file__).parent / "presets"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _split_list(value: object) -> object:
    """`"400,100"` or `"[400, 100]"` from a command line becomes a list; `""` an empty one."""
    return [part for part in value.strip("[]() ").split(",") if part] if isinstance(value, str) else value


def _refuse_bool(value: object) -> object:
    """Python counts `True` as 1; a number that was meant as a switch is a mistake."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _refuse_unprintable(value: Any) -> Any:
    """A path that no file system allows, or that no terminal shows, is a mistake."""
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in str(value)):
        raise ValueError("should be a path of printable characters")
    return value


def _worker_count(value: object) -> int | tuple[int, int]:
    """4, `"4"`, `"2..8"` or `(2, 8)`; a range of one number is that number."""
    text = "..".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", text.strip(), re.ASCII)
    if isinstance(value, bool | float) or match is None:
        raise ValueError("should be a number of workers such as 4, or a range such as 2..8")
    least, most = int(match[1]), int(match[2] or match[1])
    if most > MOST_WORKERS:
        raise ValueError(f"should be at most {MOST_WORKERS}")
    if least > most or (least == 0 and most > 0):
        raise ValueError("should be a range from at least 1 up to a larger number, such as 2..8")
    return least if least == most else (least, most)


def _count_text(value: int | tuple[int, int]) -> int | str:
    return value if isinstance(value, int) else f"{value[0]}..{value[1]}"


Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool), Field(allow_inf_nan=False)]
WorkerCount = Annotated[
    int | tuple[int, int], PlainValidator(_worker_count), PlainSerializer(_count_text, when_used="json")
]
FilePath = Annotated[Path, AfterValidator(_refuse_unprintable)]
Location = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value),
    Field(min_length=1),
    AfterValidator(_refuse_unprintable),
]
"""A directory or a URI; see `vae_ray.storage.locations`."""
Widths = Annotated[
    tuple[Annotated[Int, Field(ge=1, le=65536)], ...], Field(max_length=256), BeforeValidator(_split_list)
]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(_Section):
    """Where images come from."""

    source: Literal["digits", "mnist", "fashion_mnist", "kmnist"] = Field(
        "digits", description="Data set; digits ships inside scikit-learn and needs no download."
    )
    root: Location | None = Field(
        None,
        description="Directory or URI (s3://, gs://) of the raw files in torchvision's layout (ROOT/MNIST/raw/...); "
        "null means datasets/ inside data.cache_dir. No effect for digits.",
    )
    download: bool = Field(True, description="Download raw files that are absent. No effect for digits.")
    cache_dir: FilePath | None = Field(
        None,
        description="Directory of the decoded, memory-mapped images; null means $VAE_RAY_CACHE, else ~/.cache/vae_ray.",
    )
    num_validation: Int = Field(
        0, ge=0, description="Training images set aside (seeded by run.seed) as the validation split."
    )


class ModelConfig(_Section):
    """Encoder and decoder, and the distribution of a pixel."""

    network: Literal["mlp"] = Field("mlp", description="Encoder/decoder pair.")
    hidden: Widths = Field((400, 100), description="Widths of the encoder's hidden layers; the decoder mirrors them.")
    latent_dim: Int = Field(20, ge=1, le=65536, description="Number of latent dimensions.")
    initialization: Literal["torch", "he"] = Field(
        "torch", description="Initial weights: torch's own, or he: He's, with a decoder that starts at the mean image."
    )
    encoder_range: Literal["unit", "signed"] = Field(
        "unit", description="Range of pixels fed to the encoder: unit [0, 1] or signed [-1, 1]."
    )
    likelihood: Literal["bernoulli", "gaussian"] = Field(
        "bernoulli", description="Distribution of a pixel in [0, 1] given z."
    )
    gaussian_scale: Float = Field(
        0.1,
        gt=0,
        description="Standard deviation of a pixel under the gaussian likelihood, in units of the "
        "[0, 1] range. No effect for bernoulli.",
    )


class ObjectiveConfig(_Section):
    """How distortion and rate combine into the loss."""

    beta: Float = Field(1.0, ge=0, description="Weight of the rate (KL); 1 gives the negative ELBO.")
    beta_schedule: Literal["constant"] = Field("constant", description="How beta changes over the run.")


class OptimConfig(_Section):
    """Stochastic optimisation."""

    optimizer: Literal["adam", "adamw"] = Field("adam", description="Update rule.")
    lr: Float = Field(1e-3, gt=0, description="Peak learning rate, for the mean gradient of the global batch.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Decay of the learning rate to zero over all steps of the run."
    )
    warmup_steps: Int = Field(0, ge=0, description="Steps over which the learning rate first rises linearly from zero.")
    weight_decay: Float = Field(0.0, ge=0, description="Weight decay (L2 for adam, decoupled for adamw).")
    grad_clip: Float | None = Field(
        None, gt=0, description="Largest allowed global 2-norm of the gradient; null leaves it as it is."
    )


class TrainingConfig(_Section):
    """The loop."""

    epochs: Int = Field(10, ge=1, description="Passes over the training split.")
    global_batch_size: Int = Field(
        64,
        ge=1,
        description="Images a step, over all workers together; the last batch of an epoch may be smaller.",
    )
    evaluation_batch_size: Int = Field(
        1000,
        ge=1,
        description="Images a step of evaluation, over all workers together; sets memory, not the metrics.",
    )
    test_every_epochs: Int = Field(
        1,
        ge=0,
        description="Evaluate the test split every so many epochs; 0 only once, for the best checkpoint.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of matrix products; bfloat16 is autocast, weights stay float32."
    )
    nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="What to do if the loss or its gradient is not finite: stop, skip the batch, or rollback to the "
        "last checkpoint with a smaller learning rate. The batch is saved in nonfinite/ in any case.",
    )
    nonfinite_limit: Int = Field(
        3, ge=0, description="Batches to skip, or rollbacks, in a run before it stops. No effect for stop."
    )
    rollback_lr_factor: Float = Field(
        0.5, gt=0, le=1, description="Factor of the learning rate from a rollback on. Only for rollback."
    )


class WorkersConfig(_Section):
    """Who computes."""

    num: WorkerCount = Field(
        1,
        description="Ray Train workers; 0 trains in this process without Ray; a range such as 2..8 starts with as many "
        "as the cluster has room for and follows it as nodes come and go.",
    )
    cpus: Int = Field(1, ge=1, description="CPU cores, and torch threads, of each worker.")
    gpus: Int = Field(1, ge=1, description="GPUs reserved for each worker; it trains on the first. No effect on cpu.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="cuda, cpu, or auto: cuda if there is a GPU for every worker."
    )

    max_failures: Int = Field(
        3,
        ge=0,
        description="How often lost workers are replaced, going on from the last checkpoint; nodes that were "
        "announced to go away are not counted. No effect without Ray.",
    )

    @property
    def min(self) -> int:
        """The smallest number of workers that can train; 0 without Ray."""
        return self.num if isinstance(self.num, int) else self.num[0]

    @property
    def max(self) -> int:
        """The largest number of workers that can train; 0 without Ray."""
        return self.num if isinstance(self.num, int) else self.num[1]


class RunConfig(_Section):
    """The run as a whole."""

    name: Annotated[str, StringConstraints(pattern=NAME_PATTERN)] | None = Field(
        None, description="Directory of the run inside run.storage; null means SOURCE-DATE-TIME."
    )
    storage: Location = Field(
        "runs",
        description="Directory that holds all runs, or a URI (s3://BUCKET/runs, gs://...); "
        "on several nodes one that all of them see.",
    )
    seed: Int = Field(0, ge=0, lt=2**63, description="Seed of weights, order of images and latent noise.")
    checkpoints_kept: Int = Field(1, ge=1, description="Best checkpoints kept; the last is kept besides.")
    checkpoint_every_steps: Int | None = Field(
        None,
        ge=0,
        description="Steps of the run between checkpoints inside an epoch, of which the newest is kept until the "
        "epoch's own is written; null or 0: only at the end of epochs.",
    )


class Experiment(_Section):
    """Everything that determines a run; frozen plain data.

    Build one with `Experiment.preset(name)`, `Experiment.from_file(path)` or keyword sections, and vary it
    with `with_overrides({"optim.lr": 3e-4})`.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    workers: WorkersConfig = WorkersConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def preset(cls, name: str) -> Experiment:
        """The preset of that name; raises `UserError` with the nearest real name if there is none."""
        if name not in preset_names():
            raise UserError(f"preset {name!r} does not exist; {_did_you_mean(name, preset_names())}")
        return cls.from_file(PRESET_DIR / f"{name}.yaml")

    @classmethod
    def from_file(cls, path: str | Path) -> Experiment:
        """An experiment from YAML sections; raises `UserError` if it cannot be read or is not valid."""
        try:
            content = parse_yaml(read_bytes(Path(path)))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as YAML: {_one_line(error)}") from None
        return cls.from_dict({} if content is None else content, origin=str(path))

    @classmethod
    def from_dict(cls, sections: object, *, origin: str = "experiment") -> Experiment:
        """An experiment from nested plain data; missing keys take their defaults."""
        if not isinstance(sections, Mapping):
            raise UserError(f"{origin}: must be a mapping of sections ({', '.join(cls.model_fields)})")
        flat: dict[str, Any] = {}
        for section, fields in sections.items():
            if section not in cls.model_fields or not isinstance(fields, Mapping):
                flat[str(section)] = fields
            else:
                flat.update({f"{section}.{key}": value for key, value in fields.items()})
        return cls().with_overrides(flat)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Experiment:
        """A copy with dotted keys replaced, as in `{"optim.lr": 3e-4, "model.latent-dim": "8"}`.

        Strings are read as the field's type; everything is validated again. Raises `UserError` naming the
        key, the value received, what is allowed and the nearest real key.
        """
        sections = self.model_dump()
        for key, value in overrides.items():
            section, name = _resolve_key(key)
            text_means_null = isinstance(value, str) and value.lower() in ("null", "none", "~")
            sections[section][name] = None if text_means_null else value
        try:
            return Experiment.model_validate(sections)
        except ValidationError as error:
            raise UserError(_explain(error)) from None

    def to_dict(self) -> dict[str, Any]:
        """Nested plain data (JSON and YAML types only), complete with defaults."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """YAML that `from_file` reads back as an equal experiment."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None)

    def flat(self) -> dict[str, Any]:
        """`{"data.source": "digits", ...}` in plain data."""
        return {f"{section}.{key}": v for section, fields in self.to_dict().items() for key, v in fields.items()}


class FieldDoc(typing.NamedTuple):
    """One field as the command line's help shows it."""

    key: str
    type: str
    default: Any
    description: str


def field_docs() -> Iterator[FieldDoc]:
    """Every dotted key of the Experiment with its type, default and sentence of documentation."""
    for section, info in Experiment.model_fields.items():
        for name, field in typing.cast(type[BaseModel], info.annotation).model_fields.items():
            yield FieldDoc(f"{section}.{name}", _type_name(field.annotation), field.default, field.description or "")


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESET_DIR.glob("*.yaml"))


def differing_fields(old: Experiment, new: Experiment) -> list[str]:
    """Readable `key: old -> new` lines for every field in which two experiments differ."""
    before, after = old.flat(), new.flat()
    return [f"{key}: {before[key]!r} -> {after[key]!r}" for key in before if before[key] != after[key]]


def _resolve_key(key: str) -> tuple[str, str]:
    section, _, name = str(key).replace("-", "_").partition(".")
    known = [doc.key for doc in field_docs()]
    if f"{section}.{name}" not in known:
        raise UserError(f"key {key!r} does not exist; {_did_you_mean(f'{section}.{name}', known)}")
    return section, name


def _did_you_mean(wrong: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5)
    by_last_part = [key for key in known if key.rpartition(".")[2] == wrong.strip(".").rpartition(".")[2]]
    if near or by_last_part:
        return f"did you mean {(by_last_part or near)[0]!r}?"
    return f"choose one of {', '.join(known)}"


def _explain(error: ValidationError) -> str:
    """One line for the first of pydantic's errors: key, value received, what is allowed, what to try."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location[:2])
    defaults = {doc.key: doc for doc in field_docs()}
    hint = f"; for example {_example(defaults[key])}" if key in defaults else ""
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if key == "run.name":
        reason = "should be 1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"
    return f"{key}: got {shown(first['input'])}, {reason}{hint}"


def _example(doc: FieldDoc) -> str:
    default = doc.default
    if doc.key == "run.name":
        default = "my-run"
    text = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return f"--{doc.key.replace('_', '-')} {text}"


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is Literal:
        return "{" + ",".join(typing.get_args(annotation)) + "}"
    if origin in (typing.Union, types.UnionType):
        return _type_name(typing.get_args(annotation)[0])
    if origin is tuple:
        return "INT,INT,..."
    return {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT", Path: "PATH"}[annotation]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
