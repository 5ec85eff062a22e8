"""Process-wide CPU settings: threads, denormals, memory and the speed of matrix products.

Entered once around a training run, in the thread that trains. Each setting has a measured reason;
`benchmarks/throughput.py` prints what they are worth on a machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

import torch

FLOAT32_TOLERANCE = 1e-5
"""Largest error, relative to the largest element, that a float32 matrix product may show against float64."""


@contextlib.contextmanager
def cpu_settings(*, num_threads: int, device: torch.device) -> Iterator[None]:
    """Settings for the body of a training run on `device`; what torch lets us restore is restored afterwards."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(num_threads)
    # Adam's second moments of always-black pixels decay into denormals, which cost 100+ cycles each:
    # without flushing, an epoch of MNIST at batch 64 takes a third longer than its first steps promise.
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(fastest_exact_precision() if device.type == "cpu" else "highest")
    _keep_freed_memory()
    # torch's and ray's modules are 10^6 objects that no step can free: do not traverse them again. (Nor now: a
    # collection before would cost a short trial more than an epoch.)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def fastest_exact_precision() -> str:
    """The name of torch's fastest float32 matmul precision that is still float32 on this processor.

    "medium" selects oneDNN, which on some processors is an exact and faster path and on others (AMX)
    rounds inputs to bfloat16; only a measurement tells which. It is for CPUs alone: on CUDA "medium" and "high" mean
    TF32, whose products have an error of about 1e-3 (torch.set_float32_matmul_precision's documentation).
    """
    for name in ("medium", "highest"):
        torch.set_float32_matmul_precision(name)
        if matmul_error() <= FLOAT32_TOLERANCE:
            return name
    return "highest"


def matmul_error() -> float:
    """Largest error of a float32 product against float64, relative to the largest element, as now set."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 784, generator=generator)
    b = torch.randn(784, 400, generator=generator)
    exact = a.double() @ b.double()
    return float((a @ b - exact).abs().max() / exact.abs().max())


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks: every step allocates its activations again, and page faults cost 5 %."""
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # absent in musl
        libc.mallopt(mmap_threshold, 32 * 1024 * 1024)  # the largest that glibc accepts
        libc.mallopt(trim_threshold, 2**31 - 1)
