"""Truth: what training sets for its process, and that it is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vae_ray.training import cpu_settings as module
from vae_ray.training.cpu_settings import FLOAT32_TOLERANCE, cpu_settings, fastest_exact_precision, matmul_error


@pytest.fixture(autouse=True)
def settings_of_the_process() -> Iterator[None]:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


def test_products_on_a_gpu_are_float32_and_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fastest_exact_precision", lambda: "medium")
    torch.set_float32_matmul_precision("high")
    with cpu_settings(num_threads=1, device=torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "highest"
    with cpu_settings(num_threads=1, device=torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "high"


def test_products_on_a_cpu_are_exact_in_the_precision_that_is_set() -> None:
    name = fastest_exact_precision()
    torch.set_float32_matmul_precision(name)
    assert matmul_error() <= FLOAT32_TOLERANCE


def test_a_precision_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"medium": 1e-3, "highest": 1e-7}
    monkeypatch.setattr(module, "matmul_error", lambda: errors[torch.get_float32_matmul_precision()])
    assert fastest_exact_precision() == "highest"


def train_and_fail() -> None:
    with cpu_settings(num_threads=1, device=torch.device("cpu")):
        assert torch.get_num_threads() == 1
        assert float(torch.tensor(1e-40) * 1) == 0  # denormals are flushed
        raise RuntimeError("in the middle of training")


def test_settings_are_restored_also_after_an_error() -> None:
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    with pytest.raises(RuntimeError, match="in the middle"):
        train_and_fail()
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "high"
    assert float(torch.tensor(1e-40) * 1) > 0
