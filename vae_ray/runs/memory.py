"""What a run needs of memory at least, so that one that cannot fit is refused before it starts."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_ray.config.experiment import Experiment
from vae_ray.errors import UserError
from vae_ray.machine import local_memory_bytes
from vae_ray.models.vae import VAE

OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""In the messages of torch's RuntimeErrors."""


@contextlib.contextmanager
def saved_for_backward(num_rows: Collection[int]) -> Iterator[dict[int, int]]:
    """Bytes, by storage, of what autograd keeps in its body for the backward pass and grows with the batch.

    These are the tensors whose first dimension is one of `num_rows`, on any device, meta too. Some layers fold the
    batch into another size, so that it is a lower bound.
    """
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        if tensor.ndim and tensor.shape[0] in num_rows and not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield saved


class Memory(NamedTuple):
    """What one machine, or one of its GPUs, has for a run, and what of the run it holds."""

    num_bytes: int
    owner: str
    num_copies: int
    """Of the weights."""
    num_images: int
    """Of a global batch."""


def memory_of(experiment: Experiment) -> Memory:
    """The memory that a run on this machine fills; `workers` are resolved."""
    workers, batch = max(1, experiment.workers.max), experiment.training.global_batch_size
    if experiment.workers.device != "cpu" and torch.cuda.is_available():
        num_bytes = torch.cuda.get_device_properties(0).total_memory
        return Memory(num_bytes, "a GPU here has", 1, -(-batch // workers))
    return Memory(local_memory_bytes(), "this process may use", workers, batch)


def check_memory(experiment: Experiment, model: VAE, *, image_bytes: int, num_samples: int) -> None:
    """Refuse what cannot fit into the memory of this machine, or of a GPU of it; `workers` are resolved.

    `image_bytes` are kept for the backward pass for each image, with `num_samples` samples. All numbers are lower
    bounds: temporary tensors and libraries come in addition. Raises `UserError` that names the largest part.
    """
    memory, training = memory_of(experiment), experiment.training
    parts = {"model.network": model.network, "model.prior": model.prior}
    needed = {
        key: memory.num_copies * training_bytes(part, averaged=training.ema_decay is not None)
        for key, part in parts.items()
    }
    room, has = memory.num_bytes - sum(needed.values()), f"but {memory.owner} {size_text(memory.num_bytes)}"
    if room < 0:
        key = max(needed, key=needed.__getitem__)
        num_weights = sum(parameter.numel() for parameter in parts[key].parameters())
        copies = f" for {memory.num_copies} workers" if memory.num_copies > 1 else ""
        raise UserError(
            f"{key}: got {num_weights:,} weights, which need {size_text(needed[key])} of memory with their gradients "
            f"and moments{copies}, {has}; should be a smaller one"
        )
    activations = memory.num_images * (image_bytes // 2 if training.precision == "bfloat16" else image_bytes)
    if activations <= room:
        return
    size, fitting = training.global_batch_size, room / activations
    needs = f"needs {size_text(activations)} of memory for activations, {has}; for example"
    if num_samples > 1:
        fewer = max(1, int(num_samples * fitting))
        raise UserError(f"objective.num_samples: got {num_samples}, {needs} --objective.num-samples {fewer}")
    if size * fitting >= 1:
        raise UserError(
            f"training.global_batch_size: got {size}, {needs} --training.global-batch-size {int(size * fitting)}"
        )
    raise UserError(f"model.network: one image {needs} a smaller network, or smaller images")


def training_bytes(part: nn.Module, *, averaged: bool) -> int:
    """Bytes of the weights, and of trained ones also of the gradient and Adam's two moments; with their average."""
    return sum(
        parameter.numel() * parameter.element_size() * ((4 if parameter.requires_grad else 1) + averaged)
        for parameter in part.parameters()
    )


def size_text(num_bytes: float) -> str:
    """`21.1 GB`, or `4.6 MB` below one GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a GPU, was refused."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
    )
