"""What this machine has: versions, devices and the back ends that apply. Goes into every result file."""

from __future__ import annotations

import platform
from typing import TypedDict

import torch

from ._requirements import installed_version

PACKAGES = ("gap-triton", "torch", "triton", "transformers", "flash-attn")


class Environment(TypedDict):
    """Versions by package (None = not installed), the compute devices, and which back ends can be used."""

    versions: dict[str, str | None]
    devices: list[str]
    backends: dict[str, str]


def installed_versions() -> dict[str, str | None]:
    """Return the version of each package that matters here, and of Python."""
    versions = {package: installed_version(package.replace("-", "_")) for package in PACKAGES}
    return {"python": platform.python_version(), **versions}


def device_name(device: torch.device | str) -> str:
    """Return a name that a reader of a result file can place, such as ``"NVIDIA H200"`` or ``"CPU, 2 threads, x86_64"``."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"


def default_device() -> torch.device:
    """Return the first CUDA device where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment() -> Environment:
    """Return the versions, devices and back ends of this machine."""
    cuda = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    versions = installed_versions()
    flash = versions["flash-attn"] is not None
    return {
        "versions": versions,
        "devices": [device_name(device) for device in (*cuda, torch.device("cpu"))],
        "backends": {
            "dense attention": "flash-attn on CUDA in half precision, else sdpa"
            if flash and cuda
            else "sdpa",
            "operators": "Triton on CUDA, else the PyTorch reference" if cuda else "PyTorch reference",
        },
    }
