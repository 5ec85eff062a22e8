"""What trials are compared by (`--metric`): values that training records, and values of `vae-ray evaluate`.

Beta occurs in none of them. Of what is recorded lower is better, and two metrics make a Pareto front. A value of an
evaluation ranks alone: it is known only when a trial has ended, of its best checkpoint, that of the smallest nelbo.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from vae_ray.config.keys import did_you_mean
from vae_ray.errors import UserError
from vae_ray.evaluation.metrics import ELBO_TERMS
from vae_ray.evaluation.table import unit_of, with_unit
from vae_ray.run_files.progress import format_nats

TERMS = ("nelbo", *ELBO_TERMS)
METRICS = tuple(f"{split}/{term}" for split in ("val", "train") for term in TERMS)
"""Those that training records."""
AUTOENCODER = "an autoencoder (beta = 0) would win"
COLLAPSED = "a collapsed trial, whose latents ignore the image, would win"
WINS_ALONE = {"rate": COLLAPSED, "distortion": AUTOENCODER}


class Value(NamedTuple):
    """A value of an evaluation that can rank trials."""

    metric: str
    """Of the table of metrics (`vae_ray.evaluation.table`), which gives it."""
    higher_is_better: bool = True


class Refused(NamedTuple):
    """One that cannot."""

    metric: str
    why: str
    instead: str = "nelbo"


EVALUATED: dict[str, Value] = {
    "nll": Value("nll", higher_is_better=False),
    "linear_probe[LABEL]": Value("representation"),
    "neighbours[LABEL]": Value("representation"),
    **dict.fromkeys(
        (
            *("mig_locatello", "mig_chen", "sap", "dci_completeness", "dci_informativeness", "explicitness"),
            *("factor_vae_score", "beta_vae_score"),
        ),
        Value("disentanglement"),
    ),
}
_OWN_SPACE = "its feature space is a classifier that each evaluation trains, and that differs by machine"
REFUSED: dict[str, Refused] = {
    "bits_per_dim": Refused("elbo", "it is nelbo in another unit"),
    "rate_group_K": Refused("elbo", COLLAPSED),
    "nll_bits_per_dim": Refused("nll", "it is nll in another unit", "nll"),
    "nll_bound_K": Refused("nll", "it is a looser bound than nll", "nll"),
    "effective_samples": Refused("nll", COLLAPSED, "nll"),
    "active_units": Refused("active-units", AUTOENCODER),
    "informative_dimensions": Refused("rates", AUTOENCODER),
    "mutual_information": Refused("aggregated-posterior", AUTOENCODER),
    "marginal_kl": Refused("aggregated-posterior", COLLAPSED),
    "total_correlation": Refused("aggregated-posterior", COLLAPSED),
    "prior_overlap": Refused("aggregated-posterior", COLLAPSED),
    "mse": Refused("reconstruction", AUTOENCODER),
    "psnr": Refused("reconstruction", AUTOENCODER),
    "ssim": Refused("reconstruction", AUTOENCODER),
    "fid": Refused("fid", _OWN_SPACE),
    "fid_of_training_images": Refused("fid", "it is of images, not of a trial"),
    "kid": Refused("kid", _OWN_SPACE),
    "precision": Refused("precision-recall", "a trial that repeats one good image would win"),
    "recall": Refused("precision-recall", "a trial whose samples are scattered everywhere would win"),
    "linear_probe": Refused("representation", "it is of a label", "linear_probe[LABEL]"),
    "neighbours": Refused("representation", "it is of a label", "neighbours[LABEL]"),
    "linear_probe[LABEL, pca of pixels]": Refused("representation", "it is of images, not of a trial"),
    "neighbours[LABEL, pca of pixels]": Refused("representation", "it is of images, not of a trial"),
    "mig_ceiling": Refused("disentanglement", "it is of the factors, not of a trial", "mig_locatello"),
    "modularity": Refused(
        "disentanglement", "it says nothing about how much is known, and is large of noise", "mig_locatello"
    ),
    "dci_disentanglement": Refused(
        "disentanglement", "a trial that knows one factor alone would win", "dci_completeness"
    ),
}


class Ranked(Protocol):
    """What can be ranked: a trial, or a configuration."""

    @property
    def name(self) -> str: ...

    @property
    def failed(self) -> bool: ...

    @property
    def score(self) -> float:
        """The selection metric."""

    def value(self, metric: str) -> float | None: ...


def checked_metrics(metric: str | Sequence[str]) -> tuple[str, ...]:
    """The metrics of a comma-separated text or a list; raises `UserError` for those by which trials do not compare."""
    given = re.split(r",(?![^\[]*\])", metric) if isinstance(metric, str) else metric
    metrics = tuple(name.strip() for name in given)
    for name in metrics:
        _check_metric(name, is_alone=len(metrics) == 1)
    if not 1 <= len(metrics) <= 2 or len(set(metrics)) < len(metrics):
        raise UserError(
            f"metric: got {','.join(metrics)!r}, should be one metric or two different ones of {', '.join(METRICS)}"
        )
    return metrics


def _check_metric(name: str, *, is_alone: bool) -> None:
    split, _, term = name.partition("/")
    if term == "loss":
        raise UserError(
            f"metric: got {name!r}, trials of different beta cannot be compared by what they optimised: "
            "the smallest beta would win; use --metric val/nelbo"
        )
    if split == "test":
        raise UserError(
            f"metric: got {name!r}, the test split must not select the winner, or its metrics are no test; "
            f"use --metric val/{term}"
        )
    if split not in ("val", "train") or _term(name) not in {*TERMS, *EVALUATED, *REFUSED}:
        names = [*METRICS, *(f"val/{value}" for value in EVALUATED)]
        raise UserError(f"metric: got {name!r}; {did_you_mean(name, names)}")
    if is_alone and term in WINS_ALONE:
        raise UserError(
            f"metric: got {name!r}, {WINS_ALONE[term]}; use --metric {split}/nelbo, or "
            f"--metric {split}/rate,{split}/distortion for the trade-off"
        )
    if refused := REFUSED.get(_term(name)):
        raise UserError(
            f"metric: got {name!r}, {refused.why}; use --metric {split}/{refused.instead}, and --evaluate "
            f"{refused.metric} to see it beside that"
        )
    if is_evaluated(name) and not is_alone:
        raise UserError(f"metric: got {name!r} among two, but it ranks alone; use --metric {name}")
    if split == "train" and evaluated_by(name) == "representation":
        raise UserError(f"metric: got {name!r}, but it is fitted to training images; use --metric val/{term}")


def _term(metric: str) -> str:
    """A metric as the tables name it, without its split: `linear_probe[LABEL]`, `fid` of any space, `nll_bound_K`."""
    name, bracket, inside = metric.partition("/")[2].partition("[")
    if bracket and name in ("linear_probe", "neighbours"):
        return f"{name}[LABEL{', pca of pixels' if inside.endswith(', pca of pixels]') else ''}]"
    return re.sub(r"_\d+$", "_K", name)


def is_evaluated(metric: str) -> bool:
    """Whether a metric is known of evaluations only."""
    return _term(metric) in EVALUATED


def evaluated_by(metric: str) -> str | None:
    """The metric of `vae-ray evaluate` that gives a value; None of those that training records."""
    entry = EVALUATED.get(_term(metric)) or REFUSED.get(_term(metric))
    return entry.metric if entry else None


def without_siblings(columns: Iterable[str], metrics: Sequence[str]) -> list[str]:
    """The columns without those that come with a metric of evaluations that ranks: a dozen of disentanglement."""
    ranking = {evaluated_by(metric) for metric in metrics} - {None}
    return [key for key in columns if key in metrics or evaluated_by(key) not in ranking]


def higher_is_better(metric: str) -> bool:
    """Whether larger values of a metric are better; of all that training records smaller ones are."""
    return is_evaluated(metric) and EVALUATED[_term(metric)].higher_is_better


def curve_metrics(metrics: Sequence[str]) -> list[str]:
    """What there is of each epoch: the metrics, or instead of one of evaluations the nelbo that selects checkpoints."""
    return [f"{metric.partition('/')[0]}/nelbo" if is_evaluated(metric) else metric for metric in metrics]


def cost(item: Ranked, metrics: Sequence[str]) -> float:
    """By what items are sorted, the best first: one metric in its direction; of two, the selection metric."""
    value = item.score if len(metrics) > 1 else item.value(metrics[0])
    return math.inf if value is None else -value if higher_is_better(metrics[0]) else value


def better(metrics: Sequence[str]) -> str:
    """Which values are better, in words."""
    return "higher is better" if higher_is_better(metrics[0]) else "lower is better"


def value_text(metric: str, value: float | None) -> str:
    """A value as one reads it, without its unit; a dash without one."""
    if value is None:
        return "–"
    unit = unit_of(metric)
    return format_nats(value) if unit == "nats" else with_unit(metric, value).removesuffix(f" {unit}")


def with_its_unit(metric: str, *, per_image: bool = False) -> str:
    """The metric's name with its unit, as of an axis."""
    unit = unit_of(metric) + " per image" * per_image
    return f"{metric} ({unit})" if unit_of(metric) else metric
