"""What is here: versions, what the machine can do, and which path each operator takes."""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict

import gap_kernels
import torch
from gap_kernels.backends import use_triton

from bench import cuda, floor, timing
from bench.machine import machine
from bench.outcome import Found, StepFailed
from bench.shapes import make_inputs
from bench.steps.settings import Settings
from gap_triton.environment import installed_versions

PROPERTIES = (
    *("name", "major", "minor", "multi_processor_count", "max_threads_per_multi_processor"),
    *("regs_per_multiprocessor", "shared_memory_per_multiprocessor", "L2_cache_size", "total_memory"),
)
TOOLS = ("gcc", "compute-sanitizer", "ncu", "nvidia-smi")


@torch.inference_mode()
def probe(settings: Settings) -> Iterator[Found]:
    """Versions first, so that they are known whatever comes after."""
    yield {"machine": asdict(machine(settings.device)), "versions": installed_versions()}
    yield {
        "host": {"python": platform.python_version(), "processors": os.cpu_count()},
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "load": os.getloadavg(),
    }
    if cuda.is_cuda(settings.device):
        yield {"gpu": gpu(settings.device)}
    rates = floor.measure_rates(settings.device, settings.dtype)
    yield {
        "copy_tb_per_s": rates.bytes_per_us / 1e6,
        "product_tflop_per_s": rates.flops_per_us / 1e6,
        "launch_us": rates.launch_us,
    }
    paths = {}
    for name, call, case in settings.every_call():
        x = make_inputs(case, settings.dtype, settings.device)
        paths[name] = path_of(functools.partial(call, x), settings.device)
        yield {"operator": name, "path": paths[name]}
    ran = [name for name, path in paths.items() if path["kernels"]]
    yield {"operators": len(paths), "on_kernels": len(ran)}
    if cuda.is_cuda(settings.device) and not any(path["kernels"] + path["others"] for path in paths.values()):
        yield {"profiler": "saw nothing on the GPU, so what ran is not known"}
        return
    elsewhere = [name for name in paths if cuda.is_cuda(settings.device) and name not in ran]
    if elsewhere:
        raise StepFailed(f"no kernel of this package was seen on the GPU: {'; '.join(elsewhere)}")


def gpu(device: torch.device) -> Found:
    """What says how much runs on a GPU at once."""
    properties = torch.cuda.get_device_properties(device)
    # Not every version of torch knows them all.
    return {name: getattr(properties, name, None) for name in PROPERTIES}


def path_of(call: timing.Function, device: torch.device) -> Found:
    """What ran for one call: on a GPU the kernels that the profiler saw there, which no setting can make up."""
    if not cuda.is_cuda(device):
        call()
        chosen = "triton" if use_triton(torch.empty(0, device=device)) else "reference, no kernel ran"
        return {"kernels": [], "others": [], "chosen": chosen}
    seen = sorted(set(timing.launched(call, device)))
    ours = kernel_names()
    return {
        "kernels": [name for name in seen if name in ours],
        "others": [name[:60] for name in seen if name not in ours],
        "chosen": "triton" if use_triton(torch.empty(0, device=device)) else "reference",
    }


@functools.cache
def kernel_names() -> set[str]:
    """Names of the functions under ``triton.jit`` in `gap_kernels`."""
    from triton.runtime import KernelInterface

    names = set()
    for module in pkgutil.walk_packages(gap_kernels.__path__, f"{gap_kernels.__name__}."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, KernelInterface):
                names.add(name)
    return names
