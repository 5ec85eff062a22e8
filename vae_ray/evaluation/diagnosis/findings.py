"""What `vae-ray diagnose` recognises: a table of checks, each a function of the evidence alone.

A check returns None or a `Finding`. Its docstring says by what numbers the illness shows, and why the threshold lies
where it does: "healthy" are runs of all networks, priors, likelihoods and objectives on the digits (tests/evaluation/
test_diagnosis.py has ten of them).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vae_ray.config.fields import MIN_PIXEL_SCALE
from vae_ray.evaluation.diagnosis import failures
from vae_ray.evaluation.diagnosis.evidence import Evidence
from vae_ray.evaluation.diagnosis.failures import INFORMATIVE_NATS, Finding
from vae_ray.models.latents import LOGVAR_MARGIN, LOGVAR_RANGE
from vae_ray.models.likelihoods.laplace import Laplace
from vae_ray.models.likelihoods.location_scale import LocationScale

MOST_SEPARATION = 0.95
MOST_GAP = 0.15
LEAST_EXPLAINED = 0.2
FEW_EPOCHS = 4
MOST_RISE = 0.1
WINDOW, MOST_OSCILLATION = 10, 0.1
LAST_PART, MOST_FALL = 0.2, 0.05
VARIATION, SAME_VALUE = 0.1, 0.01
MOST_EQUAL = 0.01
NEAR_BOUND = 1.05


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a model by the names of the checks, and the numbers that they rest on."""

    findings: dict[str, Finding]
    numbers: dict[str, float]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.is_problem for finding in self.findings.values())

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        findings = [{"name": name, **finding._asdict()} for name, finding in self.findings.items()]
        return {"is_healthy": self.is_healthy, "findings": findings, "numbers": self.numbers}

    def __str__(self) -> str:
        """A block a finding, problems first; what is healthy is said with its numbers."""
        ordered = sorted(self.findings.items(), key=lambda item: not item[1].is_problem)
        blocks = [f"{name}\n  {each.evidence}\n  try {each.remedy}" for name, each in ordered]
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
        return "\n\n".join([*([f"nothing wrong found\n  {numbers}"] if self.is_healthy else []), *blocks])


def diagnose(evidence: Evidence) -> Diagnosis:
    """All that the checks find. Of a model that has learned nothing only what does not follow from that."""
    found: dict[str, Finding] = {}
    for name, check in CHECKS.items():
        is_useless = COLLAPSE in found or NO_LEARNING in found
        if not (is_useless and check not in INDEPENDENT) and (finding := check(evidence)) is not None:
            found[name] = finding
    return Diagnosis(found, _numbers(evidence))


def posterior_collapse(evidence: Evidence) -> Finding | None:
    """No dimension has a mean rate of 0.01 nats over test images; healthy runs have 0.6 nats or more in all."""
    return failures.collapse(float(evidence.rates.max()), evidence.experiment)


def no_learning(evidence: Evidence) -> Finding | None:
    """The mean training image in place of every test image costs no more than the model does."""
    return failures.no_learning(
        evidence.nats(evidence.test),
        evidence.baseline,
        cost=evidence.cost,
        num_images=len(evidence.test["rate"]),
        experiment=evidence.experiment,
    )


def unused_group(evidence: Evidence) -> Finding | None:
    """A latent group of a hierarchy carries less than 0.01 nats, as no dimension does in `posterior_collapse`."""
    rates = evidence.test["rate_by_group"].astype(np.float64).mean(0)
    unused = [f"group {number} carries {rate:.2g}" for number, rate in enumerate(rates, 1) if rate < INFORMATIVE_NATS]
    if len(rates) == 1 or not unused:
        return None
    what = f"{', '.join(unused)} of {rates.sum():.1f} nats per image: the hierarchy is not used"
    free_bits = evidence.experiment.flat().get("objective.free_bits")
    axis = "--objective elbo " if free_bits is None else ""
    return Finding(what, f"{axis}--objective.free-bits {2 * free_bits if free_bits else 1:g}")


def idle_dimensions(evidence: Evidence) -> Finding | None:
    """Information, no problem: dimensions below 0.01 nats cost nothing, and samples do not depend on them."""
    num, informative = len(evidence.rates), int((evidence.rates >= INFORMATIVE_NATS).sum())
    if informative == num:
        return None
    what = f"{num - informative} of {num} latent dimensions carry less than {INFORMATIVE_NATS} nats: they do no harm"
    latent_dim = evidence.experiment.model.latent_dim
    # of a hierarchy each group has dimensions of its own
    smaller = max(1, informative if latent_dim == num else latent_dim - 1)
    return Finding(what, f"--model.latent-dim {smaller} for a smaller model", is_problem=False)


def prior_holes(evidence: Evidence) -> Finding | None:
    """The aggregated posterior lies elsewhere than the prior: samples are of codes that no image has.

    By a two-sample test (`two_samples.separation`) of z ~ q(z|x) of training images against z ~ p(z), which says
    something at high rates too, where the marginal KL does not. In 25 healthy runs it is 0.51 to 0.94 (with a beta of
    0.25), with a beta of 0 or 0.01 it is 0.98 to 1, with a capacity beyond what images hold 0.98 to 1.
    """
    area = evidence.separation
    if area < MOST_SEPARATION:
        return None
    what = (
        f"the prior lies elsewhere than the codes of images, so that samples are worse than reconstructions: a "
        f"classifier tells a code of an image from one of the prior in {100 * area:.0f} of 100 pairs (50 if they were "
        "alike)"
    )
    return Finding(what, _against_holes(evidence))


def _against_holes(evidence: Evidence) -> str:
    flat = evidence.experiment.flat()
    objective, beta = flat["objective.name"], flat.get("objective.beta", 1.0)
    if objective == "geco":
        return f"{_larger_target(flat)}, for a smaller rate"
    if flat.get("objective.capacity"):
        return f"--objective.capacity {flat['objective.capacity'] / 2:.4g}"
    if objective == "mmd":
        return f"--objective.weight {10 * flat['objective.weight']:.4g}"
    if beta < 1:
        return f"--objective.beta {min(1.0, 10 * beta) if beta else 1:.4g}"
    if flat["model.prior.name"] == "standard":
        return "--model.prior vamp, a prior that is trained"
    return f"--objective.beta {2 * beta:.4g}" if "objective.beta" in flat else "--objective elbo --objective.beta 2"


def _larger_target(flat: Mapping[str, Any]) -> str:
    target = float(flat["objective.target"])
    return f"--objective.target {target + max(1.0, 0.2 * abs(target)):.4g}"


def overfitting(evidence: Evidence) -> Finding | None:
    """New images cost more than those of training: as the curves show it, else as the best checkpoint does."""
    return _risen_curve(evidence) or _gap(evidence)


def _risen_curve(evidence: Evidence) -> Finding | None:
    """The curve of images that are not trained with rises after its best epoch although that of training falls on.

    By a tenth of what was learned, and by more than the curve goes up and down anyway. In healthy runs, also of 30
    epochs at a constant learning rate, it rises by at most 0.02 of that.
    """
    name, epochs, nats, scale = evidence.watched
    train = dict(zip(*evidence.curve("train")[1:3], strict=True))
    if name.startswith("train") or len(nats) < FEW_EPOCHS:
        return None
    best, last = epochs[int(nats.argmin())], epochs[-1]
    rise = nats[-1] - nats.min()
    is_small = rise <= MOST_RISE * scale or rise < returned_rises(nats)
    if is_small or not {best, last} <= set(train) or train[last] >= train[best]:
        return None
    what = (
        f"{name} was lowest after epoch {best} of {last}, {nats.min():.5g} nats, and has risen to {nats[-1]:.5g}, "
        f"while that of training fell from {train[best]:.5g} to {train[last]:.5g}"
    )
    return Finding(what, _against_overfitting(evidence, best_epoch=best))


def _gap(evidence: Evidence) -> Finding | None:
    """A part of what the model is better than the mean image on training images is lost on test images.

    In healthy runs, all of 1,294 training images, up to 0.09; of 58 and 353 images 0.19 and 0.22.
    """
    train, test = (evidence.gain(arrays) for arrays in (evidence.train, evidence.test))
    if train is None or test is None or train <= 0:
        return None
    at_train, at_test = evidence.nats(evidence.train), evidence.nats(evidence.test)
    # test images may be easier or harder by themselves: as they are, and each against the mean image
    lost = min(train - test, at_test - at_train) / train
    if lost < MOST_GAP:
        return None
    what = (
        f"{evidence.cost.name} {at_train:.5g} nats on training images, {at_test:.5g} on test images: "
        f"{100 * lost:.0f} % of what the model is better than the mean image ({train:.4g} nats) is lost on new images"
    )
    return Finding(what, _against_overfitting(evidence, best_epoch=None))


def _against_overfitting(evidence: Evidence, *, best_epoch: int | None) -> str:
    flat = evidence.experiment.flat()
    if best_epoch is not None and not evidence.watched.name.startswith("val"):
        return f"--training.epochs {best_epoch}"
    if best_epoch is not None and flat["training.patience_epochs"] is None:
        return f"--training.patience-epochs {max(2, best_epoch // 2)}"
    dropout = flat.get("model.network.dropout")
    if dropout is not None and dropout < 0.5:
        return f"--model.network.dropout {dropout + 0.1:.2g}"
    return f"--model.latent-dim {max(1, flat['model.latent_dim'] // 2)}"


def underfitting(evidence: Evidence) -> Finding | None:
    """Reconstructions explain little of the variance of training images.

    Healthy runs, also with 2 dimensions or a rate of 2 nats, explain 0.26 or more; with too small or too large learning
    rates 0 to 0.13.
    """
    if evidence.explained >= LEAST_EXPLAINED:
        return None
    what = (
        f"reconstructions explain {100 * max(0.0, evidence.explained):.0f} % of the variance of training images: the "
        f"model is little better than the mean image"
    )
    return Finding(what, _against_underfitting(evidence))


def _against_underfitting(evidence: Evidence) -> str:
    experiment, flat = evidence.experiment, evidence.experiment.flat()
    if flat.get("objective.beta", 1.0) > 1 and flat.get("objective.capacity") is None:
        return "--objective.beta 1"
    if not 1e-3 <= experiment.optim.lr <= 5e-3:
        return "--optim.lr 0.001"
    if still_falling(evidence) is not None or "model.network.hidden" not in flat:
        return f"--training.epochs {2 * experiment.training.epochs}"
    return f"--model.network.hidden {','.join(str(max(64, 2 * width)) for width in flat['model.network.hidden'])}"


def scale_at_bound(evidence: Evidence) -> Finding | None:
    """The scale that the decoder has found is within 5 % of the smallest allowed, where it no longer follows errors.

    Below it are only images that are rounded more coarsely than they are reconstructed. A fixed one is the user's
    choice.
    """
    likelihood = evidence.model.likelihood
    if not isinstance(likelihood, LocationScale) or likelihood.sigma == "fixed":
        return None
    scale = float(likelihood.scale(next(evidence.model.parameters()).detach()))
    if scale > NEAR_BOUND * MIN_PIXEL_SCALE:
        return None
    what = (
        f"the decoder's scale, likelihood.sigma {likelihood.sigma}, is {scale:.4g}, at its lower bound "
        f"{MIN_PIXEL_SCALE:g}: images are reproduced more exactly than their 256 levels are known"
    )
    return Finding(what, "--likelihood.sigma fixed --likelihood.scale 0.01")


def logvar_at_bound(evidence: Evidence) -> Finding | None:
    """In a dimension more than half of the images have a log variance beyond -15, or 10, where it is held back softly.

    In healthy runs none has. That of an autoencoder, whose rate costs nothing, may fall as it will.
    """
    names = {"logvar_low": LOGVAR_RANGE[0], "logvar_high": LOGVAR_RANGE[1]}
    for name, end in names.items():
        beyond = evidence.train[name].mean(0)
        num, is_low = int((beyond > 0.5).sum()), name == "logvar_low"
        costs_nothing = evidence.cost.weight == 0 and evidence.experiment.objective.name != "geco"
        if not num or (is_low and costs_nothing):
            continue
        what = (
            f"the log variance of q(z|x) is {'below' if is_low else 'above'} {end:g} in {num} of {len(beyond)} latent "
            f"dimensions, in up to {100 * beyond.max():.0f} % of images: it is held back there, at most to "
            f"{end - LOGVAR_MARGIN if is_low else end + LOGVAR_MARGIN:g}"
        )
        return Finding(what, _against_no_noise(evidence) if is_low else _smaller_rate(evidence))
    return None


def _against_no_noise(evidence: Evidence) -> str:
    """What lets the posterior have a width again."""
    flat = evidence.experiment.flat()
    if flat["objective.name"] == "geco":
        return _larger_target(flat)
    if evidence.cost.weight < 1:
        return "--objective.beta 1"
    if "likelihood.scale" in flat:
        return f"--likelihood.sigma fixed --likelihood.scale {max(0.01, 2 * flat['likelihood.scale']):.4g}"
    return _smaller_rate(evidence)


def _smaller_rate(evidence: Evidence) -> str:
    return f"--optim.lr {evidence.experiment.optim.lr / 10:.4g}"


def skipped_steps(evidence: Evidence) -> Finding | None:
    """Any batch that was skipped, because its loss or gradient was not finite."""
    skipped = {record["epoch"]: record["num_skipped"] for record in evidence.history if record.get("num_skipped")}
    if not skipped:
        return None
    what = (
        f"{sum(skipped.values()):,} training images were skipped in {len(skipped)} of {len(evidence.history)} epochs, "
        "because their loss or gradient was not finite"
    )
    return Finding(what, _smaller_rate(evidence))


def oscillating_loss(evidence: Evidence) -> Finding | None:
    """The curve goes up and down between epochs.

    By the rises that it falls back from, within any 10 epochs, as a part of what was learned: in healthy runs, also at
    a constant learning rate, up to 0.07; with ten times a good one 0.2 to 0.75.
    """
    name, epochs, nats, scale = evidence.watched
    starts = range(max(1, len(nats) - WINDOW + 1))
    rises, first = max((returned_rises(nats[start : start + WINDOW]), start) for start in starts)
    if len(epochs) < FEW_EPOCHS or not scale or rises <= MOST_OSCILLATION * scale:
        return None
    window = epochs[first : first + WINDOW]
    what = (
        f"{name} goes up and down in epochs {window[0]} to {window[-1]}: rises that it fell back from add up to "
        f"{rises:.3g} nats, {100 * rises / scale:.0f} % of what was learned ({scale:.3g} nats)"
    )
    return Finding(what, _smaller_rate(evidence))


def returned_rises(curve: NDArray[np.floating]) -> float:
    """The sum of all rises of a curve that it falls back from.

    A rise counts as far as the fall after it goes: a curve that falls, rises and stays there has none.
    """
    steps = np.diff(curve)
    steps = steps[steps != 0]
    if not len(steps):
        return 0.0
    changes = [float(run.sum()) for run in np.split(steps, np.flatnonzero(np.diff(np.sign(steps))) + 1)]
    return sum(min(up, -down) for up, down in itertools.pairwise(changes) if up > 0)


def dead_pixels(evidence: Evidence) -> Finding | None:
    """A pixel often varies over images and has the same value in all reconstructions.

    Often: it differs by more than 0.1 from its median in a quarter of the images. Rare values a decoder may give up. A
    Laplace decoder gives medians, which can be the same for what varies in up to half of the images. The same value: a
    standard deviation below 1 % of that of the images; in healthy runs it is at least 20 %.
    """
    image, reconstruction = (evidence.train[name].astype(np.float64) for name in ("image", "reconstruction"))
    often = 0.5 if isinstance(evidence.model.likelihood, Laplace) else 0.25
    varies = (np.abs(image - np.median(image, axis=0)) > VARIATION).mean(0) > often
    num = int((varies & (reconstruction.std(0) < SAME_VALUE * image.std(0))).sum())
    if not num or evidence.explained < LEAST_EXPLAINED:  # then no pixel follows the images yet
        return None
    what = (
        f"{num} of the {int(varies.sum())} pixels that often vary over training images have the same value in all "
        "reconstructions"
    )
    return Finding(what, _smaller_rate(evidence))


def overlapping_test_set(evidence: Evidence) -> Finding | None:
    """Test images are among the training images, equal to the pixel.

    A problem from 1 % of the test images on, where what is measured on new images begins to differ; published sets
    have less.
    """
    if not evidence.num_equal:
        return None
    part = evidence.num_equal / evidence.num_test
    what = f"{evidence.num_equal:,} of {evidence.num_test:,} test images ({100 * part:.2g} %) are training images too"
    return Finding(what, "a test split without them: remove the copies", is_problem=part >= MOST_EQUAL)


def still_falling(evidence: Evidence) -> Finding | None:
    """The curve falls by more than a twentieth of what was learned in the last fifth of the epochs.

    Runs of 20 epochs whose learning rate decays to 0 fall by 0.05 at most, shorter ones by up to 0.1.
    """
    name, epochs, nats, scale = evidence.watched
    if len(epochs) < 2 or not scale:
        return None
    num_last = max(1, round(LAST_PART * len(epochs)))
    fall = nats[-1 - num_last] - nats[-1]
    if nats[-1] > nats.min() or fall <= MOST_FALL * scale:
        return None
    what = (
        f"{name} still fell by {fall:.3g} nats, to {nats[-1]:.5g}, in the last {num_last} of {epochs[-1]} epochs: "
        f"{100 * fall / scale:.0f} % of what was learned ({scale:.3g} nats)"
    )
    return Finding(what, f"--training.epochs {2 * evidence.experiment.training.epochs}")


COLLAPSE, NO_LEARNING = "posterior collapse", "nothing learned"
Check = Callable[[Evidence], Finding | None]
CHECKS: Mapping[str, Check] = {
    COLLAPSE: posterior_collapse,
    NO_LEARNING: no_learning,
    "unused latent group": unused_group,
    "prior holes": prior_holes,
    "overfitting": overfitting,
    "underfitting": underfitting,
    "decoder scale at its bound": scale_at_bound,
    "log variance at its bound": logvar_at_bound,
    "learning rate too large": oscillating_loss,
    "skipped batches": skipped_steps,
    "dead pixels": dead_pixels,
    "test set overlaps with training": overlapping_test_set,
    "metrics still fall": still_falling,
    "idle dimensions": idle_dimensions,
}
"""By the name that is printed."""
INDEPENDENT = (scale_at_bound, logvar_at_bound, skipped_steps, overlapping_test_set)
"""What a model can have beside a collapse or without having learned anything."""


def _numbers(evidence: Evidence) -> dict[str, float]:
    """What says that nothing is wrong."""
    name, gain = evidence.cost.name, evidence.gain(evidence.test)
    return {
        "images": float(len(evidence.test["rate"])),
        f"train {name}": evidence.nats(evidence.train),
        f"test {name}": evidence.nats(evidence.test),
        **({} if gain is None else {"better than the mean image by": gain}),
        "informative dimensions": float((evidence.rates >= INFORMATIVE_NATS).sum()),
        "explained variance": evidence.explained,
        "codes told from the prior": evidence.separation,
    }
