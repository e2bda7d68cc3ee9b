"""Run tests on other versions than those of constraints.txt: ``python tests/compat.py [NAME ...]``, or ``make compat``.

Each combination gets an environment of its own, ``.venv-compat-NAME``, which is kept for the next time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

KERNELS = ("tests/test_ops_kernels.py",)
CORE = tuple(
    f"tests/test_{name}.py"
    for name in (
        "oracle", "generation", "ids", "activation", "refusals", "visual_mask", "models", "models_structure",
        "vision", "strategies", "scores", "methods", "stages", "presets", "ways_assisted", "ways_caches", "ways_generation",
    )
)  # fmt: skip

# The interpreter of Triton before 3.7 can't loop to a scalar with numpy 2.4 or later.
COMBINATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "torch-2.11": (("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy<2.4"), KERNELS),
    "transformers-4.57": (("torch==2.13.0", "transformers==4.57.6"), CORE),
    "transformers-5.17": (("torch==2.13.0", "transformers==5.17.0"), CORE),
    "transformers-5.23": (("torch==2.13.0", "transformers==5.23.0"), CORE),
}
"""What to install, and which tests to run on it. On x86 Linux, PyPI's torch brings CUDA along: 5 GB a combination."""


def run(name: str) -> int:
    """Install and test one combination; the exit status of what failed, or 0."""
    requirements, tests = COMBINATIONS[name]
    folder = ROOT / f".venv-compat-{name}"
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    for command in ([*install, "--editable", f"{ROOT}[test]"], [python, "-m", "pytest", "-q", *tests]):
        status = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, check=False
        ).returncode
        if status:
            return status
    return 0


def main() -> int:
    """Run the named combinations, or all; 1 if any failed."""
    names = sys.argv[1:] or list(COMBINATIONS)
    unknown = [name for name in names if name not in COMBINATIONS]
    if unknown:
        print(f"{unknown[0]!r}: expected one of {', '.join(COMBINATIONS)}", file=sys.stderr)
        return 2
    results = {}
    for name in names:
        print(f"{name}: {', '.join(COMBINATIONS[name][0])}", flush=True)
        results[name] = run(name)
    for name, status in results.items():
        print(f"{name}: {'passed' if status == 0 else f'failed, exit status {status}'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
