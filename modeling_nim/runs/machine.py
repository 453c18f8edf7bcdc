"""What the benchmark scripts share: the machine, its matrix peak, counted FLOPs."""

import platform
import time
import timeit
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions, for the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    packages = ("torch", "transformers", "accelerate", "numpy", "Pillow", "simplejpeg", "opencv-python-headless")
    return {
        "device": name,
        "clock": "wall" if device.type == "cuda" else "CPU time of the process over its threads",
        "cpu_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Wall-clock seconds on a GPU; on a CPU this process's CPU time over its threads: other work does not count.

    Linux adds the time of the other threads up by ticks of some milliseconds: time what lasts a tenth of a second.
    """
    if device.type == "cuda":
        return time.perf_counter
    return lambda: time.process_time() / torch.get_num_threads()


def seconds_of(function: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Seconds (see `clock_of`) of each of `repeats` calls, the device idle before and after."""
    seconds, clock = [], clock_of(device)
    for _ in range(repeats):
        synchronize(device)
        before = clock()
        function()
        synchronize(device)
        seconds.append(clock() - before)
    return seconds


def count_flops(function) -> int:
    """FLOPs of the matrix products, convolutions and attention in one call; a multiply-add counts as 2."""
    # the fused attention kernels of CPUs are unknown to the counter; their plain form is the same arithmetic
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def matrix_peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The device's measured matrix peak: the best rate among square products of some sizes, FLOP/s."""
    sizes = (4096, 8192, 12288) if device.type == "cuda" else (512, 1024, 2048)
    rates = {}
    for size in sizes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products, _ = timeit.Timer(lambda a=a, b=b: (a @ b, synchronize(device))).autorange()  # that last 0.2 s

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, products: int = products) -> None:
            for _ in range(products):
                a @ b

        rates[size] = 2 * size**3 * products / min(seconds_of(multiply, device, 5))
    best = max(rates, key=rates.get)
    return {"flops_per_s": rates[best], "dtype": str(dtype).removeprefix("torch."), "matrix_size": best}
