"""What cannot fit into memory is refused before a run starts, with the key that takes most of it."""

from __future__ import annotations

import math
import re
import resource
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.small import NETWORKS
from vae_ray import Experiment, TrainingFailed, machine, train
from vae_ray.cli.main import main
from vae_ray.errors import UserError
from vae_ray.models.vae import VAE
from vae_ray.runs import memory, preflight
from vae_ray.runs.preflight import checked_model

SHAPE = (1, 8, 8)
MIB = 2**20


def test_activations_of_dense_layers_are_their_inputs() -> None:
    """Of an encoder 63-7-2x2, a decoder 2-7-63 and k samples; of x nothing, which every layer of it is given again."""
    for k in (1, 4):
        sections = {"model": {"network": {"name": "mlp", "hidden": [7]}, "latent_dim": 2}}
        objective = {"name": "iwae", "num_samples": k} if k > 1 else {"name": "elbo"}
        found = checked_model(Experiment.from_dict({**sections, "objective": objective}), (1, 7, 9), num_training=11)
        layers = 63 + 7 + k * (2 + 7)  # the inputs of the linear layers; ReLU keeps its output, which is the next input
        logits_and_targets = 2 * k * 63
        assert 4 * (layers + k * 63) <= found.image_bytes <= 4 * (layers + logits_and_targets + 30 * (1 + k))
        assert found.num_samples == k


@pytest.mark.parametrize("network", ["mlp", "resnet", "conv ladder"])
def test_a_pass_without_memory_counts_about_the_same_bytes(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {"model": {"network": NETWORKS[network], "latent_dim": 2}}
    config = Experiment.from_dict({**sections, "objective": {"name": "iwae", "num_samples": 4}})
    real = checked_model(config, SHAPE, num_training=11).image_bytes
    monkeypatch.setattr(preflight, "MOST_PIXELS_ON_CPU", 0)
    counted = checked_model(config, SHAPE, num_training=11).image_bytes
    # GroupNorm's kernels of the two devices keep different tensors
    assert real <= counted <= (1.25 if network == "resnet" else 1.0) * real


def test_activations_of_pseudo_inputs_do_not_grow_with_the_batch() -> None:
    def image_bytes(prior: dict[str, Any]) -> int:
        return checked_model(Experiment.from_dict({"model": {"prior": prior}}), SHAPE, num_training=11).image_bytes

    few, many = (image_bytes({"name": "vamp", "components": components}) for components in (5, 500))
    assert many - few <= 4 * (2 * 20 + 2) * 495  # distances to the components and log densities alone


MISTAKES: list[tuple[dict[str, Any], float, str]] = [
    ({"model.network": "mlp", "model.network.hidden": [2000]}, 2,
     "model.network: got 290,074 weights, which need 4.6 MB"),
    ({"model.network": "mlp", "model.network.hidden": [9], "model.prior": "vamp", "model.prior.components": 4000}, 3,
     "model.prior: got 256,000 weights, which need 4.1 MB"),
    ({"objective": "iwae", "objective.num_samples": 4000}, 99, "objective.num_samples: got 4000, needs "),
    ({"training.global_batch_size": 1000}, 1.4, "training.global_batch_size: got 1000, needs "),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "mib", "text"), MISTAKES, ids=lambda value: str(value)[:50])
def test_what_cannot_fit_is_one_line_and_leaves_nothing(
    overrides: dict[str, Any], mib: float, text: str, quick: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "local_memory_bytes", lambda: int(mib * MIB))
    with pytest.raises(UserError, match=re.escape(text)) as caught:
        train(quick.with_overrides(overrides))
    assert "\n" not in str(caught.value)
    assert f"but this process may use {mib * MIB / 1e6:.1f} MB" in str(caught.value)
    assert list((tmp_path / "runs").glob("*")) == []
    if example := re.search(r"for example --(\S+) (\d+)$", str(caught.value)):
        key, number = example[1].replace("-", "_"), int(example[2])
        preflight.preflight(quick.with_overrides({**overrides, key: number}))
        with pytest.raises(UserError):
            preflight.preflight(quick.with_overrides({**overrides, key: math.ceil(1.1 * number) + 1}))


def test_each_of_several_workers_here_has_a_copy(quick: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checked_model(quick, SHAPE, num_training=99).model
    one = memory.training_bytes(model, averaged=False)
    assert one == 16 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(memory, "local_memory_bytes", lambda: 3 * one)
    for num, is_refused in ((1, False), (3, False), (4, True)):
        config = quick.with_overrides({"workers.num": num})
        if is_refused:
            with pytest.raises(UserError, match=r"moments for 4 workers, but"):
                memory.check_memory(config, model, image_bytes=0, num_samples=1)
        else:
            memory.check_memory(config, model, image_bytes=0, num_samples=1)


def test_a_gpu_holds_one_workers_copy_and_images(quick: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = types.SimpleNamespace(total_memory=5 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    model = checked_model(quick, SHAPE, num_training=99).model
    on_gpus = quick.with_overrides({"workers.num": 4, "workers.device": "cuda", "training.global_batch_size": 50})
    assert memory.memory_of(on_gpus) == (5 * MIB, "a GPU here has", 1, 13)
    memory.check_memory(on_gpus, model, image_bytes=300_000, num_samples=1)
    with pytest.raises(UserError, match=r"^training.global_batch_size: got 50, needs 5.2 MB .* but a GPU here has 5.2"):
        memory.check_memory(on_gpus, model, image_bytes=400_000, num_samples=1)


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        ({"objective": "iwae", "objective.num_samples": 7}, "objective.num_samples: got 7, too many for the memory"),
        ({"objective": "elbo"}, "model.network: does not fit into memory"),
    ],
)
def test_memory_that_a_check_is_refused_is_attributed(
    objective: dict[str, Any], text: str, quick: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr(VAE, "forward", forward)
    with pytest.raises(UserError, match=re.escape(text)):
        train(quick.with_overrides(objective))


def test_memory_that_training_is_refused_is_one_line(
    quick: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vae_ray.runs.train.fit", fit)
    with pytest.raises(TrainingFailed, match=r"^out of memory \(CUDA out of memory\); a smaller training"):
        train(quick)
    storage = str(quick.run.storage)
    assert main(["train", "digits", "--workers.num", "0", "--workers.cpus", "1", "--storage", storage]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("vae-ray: out of memory (CUDA out of memory)")


def test_limits_of_containers_and_of_the_shell_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = machine.local_memory_bytes()
    v2, v1 = tmp_path / "v2", tmp_path / "v1"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (str(v2), str(v1), str(tmp_path / "none")))
    v2.write_text("max\n")
    assert machine.local_memory_bytes() >= total
    v1.write_text("300000000\n")
    assert machine.local_memory_bytes() == 300_000_000
    v2.write_text("200000000\n")
    assert machine.local_memory_bytes() == 200_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (100_000_000, resource.RLIM_INFINITY))
    assert machine.local_memory_bytes() == 100_000_000
