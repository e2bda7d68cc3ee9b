"""Loading a model and its processor, for the commands that take ``--model``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from gap_triton.demo.architecture import Architecture
from gap_triton.demo.architectures import LLAVA, QWEN2_5_VL
from gap_triton.environment import default_device

EMBEDDED: dict[str, Architecture] = {"embedded": LLAVA, "embedded-mrope": QWEN2_5_VL}
SPREAD = "auto"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, and how it is loaded.

    Attributes:
        name: Folder or hub id of a supported model, or one of `EMBEDDED`.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"auto"``, as it was saved; None = bfloat16 on a GPU,
            float32 on a CPU.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``, spread over what is there; None = the first GPU, else the
            CPU.
        revision: Branch, tag or commit on the hub; None = main.
        trust_remote_code: Whether code that comes with the model may run.
    """

    name: str
    dtype: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def embedded(self) -> Architecture | None:
        """The embedded model that this is, if it is one."""
        return EMBEDDED.get(self.name)

    @property
    def path(self) -> str:
        """Folder or hub id."""
        return self.name if self.embedded is None else str(self.embedded.folder)

    def from_hub(self) -> dict[str, Any]:
        """What ``from_pretrained`` is told of the model's origin, no more than what differs from its defaults."""
        told: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        return told | ({"trust_remote_code": True} if self.trust_remote_code else {})

    def load_processor(self) -> tuple[Any, Any]:
        """Load config and processor, which are small.

        Raises:
            ValueError: There is no such model, or what it holds can't be read.
            ImportError: A package is missing.
        """
        with naming_the_model(self.name):
            config = AutoConfig.from_pretrained(self.path, **self.from_hub())
            if self.embedded is not None:
                return config, self.embedded.load_processor(Path(self.path))
            return config, AutoProcessor.from_pretrained(self.path, **self.from_hub())

    def load_model(self, attn_implementation: str) -> Any:
        """Load the weights, which take longest.

        Raises:
            ValueError: They can't be loaded, or the model can't be pruned, or there is no such device.
            ImportError: A package is missing.
        """
        device = torch_device(self.device)
        usual = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = (
            usual if self.dtype is None else "auto" if self.dtype == "auto" else getattr(torch, self.dtype)
        )
        spread = {"device_map": "auto"} if self.device == SPREAD else {}
        with naming_the_model(self.name):
            model = AutoModelForImageTextToText.from_pretrained(
                self.path, dtype=dtype, attn_implementation=attn_implementation, **spread, **self.from_hub()
            ).eval()
            return model if spread else model.to(device)


def torch_device(name: str | None) -> torch.device:
    """Where a model's inputs go that is loaded to the device of this name.

    Raises:
        ValueError: There is no such device here.
    """
    if name is None or name == SPREAD:
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r}: expected cpu, cuda, cuda:N for the GPU of that number, or auto")
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        found = "no GPU" if not gpus else "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        raise ValueError(f"device {name!r}: PyTorch finds {found} here; leave it out, or say cpu")
    return device


@contextmanager
def naming_the_model(model_path: str) -> Iterator[None]:
    """Make any error inside a ValueError that names the model; that a package is missing stays what it is.

    A model's files are others', and so is the code that reads them: there is no saying what it raises.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"model {model_path!r} can't be loaded: {kind}{error}") from error
