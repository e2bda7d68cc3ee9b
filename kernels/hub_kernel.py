"""Lay `gap_kernels` out as a kernel of the Hugging Face Hub, and check that the library `kernels` loads it.

    python kernels/hub_kernel.py [FOLDER] [--version N] [--check]

The folder, ``build/hub-kernel`` by default, is what goes into a repository on the hub. The code is copied unchanged: the
operators register under the name that they are imported by, so a copy runs beside an installed `gap_kernels`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

SOURCE = Path(__file__).parent / "gap_kernels"
TARGET = Path(__file__).parents[1] / "build" / "hub-kernel"
VARIANT = Path("build", "torch-universal")  # of the layout: code in Python and Triton, for every torch

CARD = """---
license: apache-2.0
tags:
- kernel
---

# gap-kernels

Operators in Triton for visual token pruning in vision-language models, each with its definition in PyTorch, which is what
runs on a CPU: exact ordered top-k, attention-based importance, both with the gather in one launch, and more.

```python
from kernels import get_kernel

kernels = get_kernel("OWNER/gap-kernels", version={version})
kernels.topk_indices(scores, 64)
```

These are operators alone. Pruning a model of transformers is the package `gap-triton`: its attention implementation can't be
loaded by a name of the hub, because rows are dropped in hooks around the decoder's layers and not within attention.
"""


def build(target: Path, version: int) -> Path:
    """Write the layout of a kernel repository.

    Args:
        target: Folder to write to; what it holds of an earlier build is replaced.
        version: Of the kernel on the hub, which counts changes of its interface.

    Returns:
        The folder of the one variant.
    """
    variant = target / VARIANT
    shutil.rmtree(variant, ignore_errors=True)
    shutil.copytree(SOURCE, variant, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    metadata = {
        "id": f"_gap_kernels_{digest(variant)[:12]}",  # the name it is imported by: one a build, so that two can be loaded
        "name": "gap-kernels",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (target / "README.md").write_text(CARD.replace("{version}", str(version)), encoding="utf-8")
    return variant


def digest(folder: Path) -> str:
    """A hash of the names and contents of the files in a folder."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            found.update(len(part).to_bytes(8, "big") + part)
    return found.hexdigest()


def check(target: Path) -> None:
    """Load the build by the library `kernels`, beside the package itself, and compare an operator of both.

    Raises:
        AssertionError: They are the same module, export other names, or disagree.
    """
    import gap_kernels
    import torch

    from kernels import get_local_kernel

    loaded = get_local_kernel(target)
    assert loaded is not gap_kernels
    assert loaded.__all__ == gap_kernels.__all__
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    for module in (loaded, gap_kernels):
        assert torch.equal(module.topk_indices(scores, 7), scores.topk(7).indices.sort().values)
    namespaces = {module.library.NAMESPACE for module in (loaded, gap_kernels)}
    assert len(namespaces) == 2, namespaces
    print(f"get_local_kernel loads it as {loaded.__name__}, beside gap_kernels")


def main() -> None:
    """Read the command line, build, and check if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=TARGET)
    parser.add_argument("--version", type=int, default=1, help="version of the kernel on the hub")
    parser.add_argument("--check", action="store_true", help="load it by the library kernels (0.17 or later)")
    arguments = parser.parse_args()
    print(f"wrote {build(arguments.folder, arguments.version)}")
    if arguments.check:
        check(arguments.folder)


if __name__ == "__main__":
    main()
