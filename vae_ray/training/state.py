"""All that training changes: one object that is saved, restored and rolled back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vae_ray.config.experiment import Experiment
from vae_ray.errors import one_line
from vae_ray.evaluation.metrics import ELBO_TERMS
from vae_ray.models.vae import VAE
from vae_ray.objectives import Objective
from vae_ray.parallel.group import all_finite
from vae_ray.storage.reading import short_repr
from vae_ray.training.averaged_weights import AveragedWeights
from vae_ray.training.optimization import MOMENTS, build_optimizer

TERM_SUMS = "progress.term_sums"
OBJECTIVE = "objective."
OPTIMIZER = "optimizer."


@dataclass
class Progress:
    """What of training is neither a weight, nor an optimizer's state, nor a function of epoch and step."""

    lr_factor: float = 1.0
    """What all rollbacks have left of the learning rate."""
    num_nonfinite: int = 0
    """Batches skipped, or rollbacks, so far."""
    num_averaged: int = 0
    """Updates of the averaged weights."""
    best_value: float | None = None
    """The best value of the selection metric, in nats."""
    best_epoch: int = 0
    """The epoch that had it."""

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, Any]) -> Progress:
        """The progress that a checkpoint holds; raises `ValueError` for a value of another type."""
        values = {field.name: scalars.get(field.name, field.default) for field in fields(cls)}
        for field in fields(cls):
            allowed = (int,) if type(field.default) is int else (int, float, type(field.default))
            if type(values[field.name]) not in allowed:
                raise ValueError(f"{field.name} is {short_repr(values[field.name])}")
        return cls(**values)


@dataclass
class TrainState:
    """A model in training. Optimizers are by parameter set (`Objective.parameter_sets`)."""

    model: VAE
    objective: Objective
    optimizers: dict[str, Optimizer]
    averaged: AveragedWeights | None
    progress: Progress
    term_sums: Tensor | None = None
    """`(workers, terms + 1)`, float64: each worker's `TermSums` of an epoch that has begun."""

    @classmethod
    def begin(cls, experiment: Experiment, model: VAE, objective: Objective) -> TrainState:
        """The state before the first step of `model` and `objective`, which are on their device."""
        sets = objective.parameter_sets(model)
        optimizers = {name: build_optimizer(experiment.optim, parameters) for name, parameters in sets.items()}
        decay = experiment.training.ema_decay
        averaged = AveragedWeights(model, decay) if decay is not None else None
        return cls(model, objective, optimizers, averaged, Progress())

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms that are summed over an epoch."""
        return ("loss", *ELBO_TERMS, *self.objective.terms)

    @property
    def evaluated_model(self) -> VAE:
        """The model that is evaluated, pictured and loaded: the averaged one, where there is one."""
        return self.model if self.averaged is None else self.averaged.model

    def is_finite(self) -> bool:
        """Whether all weights and the optimizers' states are finite numbers; waits for the device."""
        return all_finite([*self.model.parameters(), *self.tensors().values()])

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the weights, by name, as a checkpoint's training state holds it."""
        tensors = {f"{OBJECTIVE}{name}": tensor for name, tensor in self.objective.state_dict().items()}
        if self.term_sums is not None:
            tensors[TERM_SUMS] = self.term_sums
        for prefix, optimizer, parameter in self._optimized():
            for name, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{prefix}{name}"] = value
        return tensors

    def scalars(self) -> dict[str, float | int | None]:
        """The progress, as a checkpoint's manifest holds it."""
        if self.averaged is not None:
            self.progress.num_averaged = self.averaged.num_updates
        return asdict(self.progress)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `scalars` gave; hyperparameters stay those of the experiment.

        Raises `ValueError` for tensors that do not belong to this state.
        """
        remaining = dict(tensors)
        self.term_sums = sums = remaining.pop(TERM_SUMS, None)
        row = (torch.float64, (len(self.terms) + 1,))
        if sums is not None and (sums.numel() == 0 or (sums.dtype, sums.shape[1:]) != row):
            raise ValueError(f"{TERM_SUMS} has shape {tuple(sums.shape)} and dtype {sums.dtype}")
        own = {name: remaining.pop(f"{OBJECTIVE}{name}", None) for name in self.objective.state_dict()}
        if any(value is None for value in own.values()):
            raise ValueError(f"lacks the objective's {short_repr(next(name for name, v in own.items() if v is None))}")
        try:
            self.objective.load_state_dict({name: value for name, value in own.items() if value is not None})
        except RuntimeError as error:  # other shapes
            raise ValueError(one_line(error)) from None
        for prefix, optimizer, parameter in self._optimized():
            names = [name for name in remaining if name.startswith(prefix) and "." not in name.removeprefix(prefix)]
            values = {name.removeprefix(prefix): remaining.pop(name) for name in names}
            expected = {"step": torch.Size([]), **dict.fromkeys(MOMENTS, parameter.shape)} if values else {}
            if {name: value.shape if value.is_floating_point() else None for name, value in values.items()} != expected:
                raise ValueError(f"the optimizer's state of {short_repr(prefix)} does not fit the parameter")
            optimizer.state.pop(parameter, None)
            if values:
                # in the memory layout of the parameter, as the optimizer's kernels expect
                moments = {name: torch.empty_like(parameter).copy_(values[name]) for name in MOMENTS}
                optimizer.state[parameter] = {"step": values["step"].to(parameter.device), **moments}
        if remaining:
            raise ValueError(f"has {short_repr(next(iter(remaining)))}, which this model's training does not have")
        self.progress = Progress.from_scalars(scalars)
        if self.averaged is not None:
            self.averaged.num_updates = self.progress.num_averaged

    def _optimized(self) -> Iterator[tuple[str, Optimizer, torch.nn.Parameter]]:
        """Every parameter that an optimizer has, with the prefix of its state's names."""
        names = {parameter: f"model.{name}" for name, parameter in self.model.named_parameters()}
        names |= {parameter: f"{OBJECTIVE}{name}" for name, parameter in self.objective.named_parameters()}
        for set_name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    yield f"{OPTIMIZER}{set_name}.{names[parameter]}.", optimizer, parameter
