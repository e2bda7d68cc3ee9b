"""Run tests on other versions than those of constraints.txt: ``make compat``, or ``tests/scripts/compat.py [NAME ...]``.

Each combination gets an environment of its own, ``.venv-compat-NAME``, which is kept for the next time; that of ``newest``
is made anew, because what is newest changes. With ``--record`` the results go into docs/compatibility.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "docs" / "results" / "compatibility.json"
PLACE = re.compile(r"(<!-- combinations -->\n).*?(<!-- end of combinations -->)", re.DOTALL)
PACKAGES = ("torch", "triton", "transformers", "numpy")
VERSIONS = f"from importlib.metadata import version; print(*map(version, {PACKAGES}))"


def _files(**folders: str) -> tuple[str, ...]:
    """Paths from the names of test files, by their folder."""
    return tuple(
        f"tests/{folder}/test_{name}.py" for folder, names in folders.items() for name in names.split()
    )


KERNELS = _files(ops="ops_kernels ops_compiled")
CORE = _files(
    decoder="oracle ids visual_mask models models_structure scores stages",
    ways="generation activation refusals ways_assisted ways_caches ways_generation",
    vision="vision",
    methods="strategies methods presets",
)
SHORT = _files(
    decoder="oracle ids",
    ways="generation activation refusals",
    ops="ops_library ops_prune",
)


@dataclass(frozen=True)
class Combination:
    """What to install, and which tests to run on it.

    Attributes:
        requirements: For pip. On x86 Linux, PyPI's torch brings CUDA along: 5 GB a combination.
        tests: Test files.
        as_a_user: The wheel is installed, into a new environment, and tested from outside of the checkout.
    """

    requirements: tuple[str, ...]
    tests: tuple[str, ...]
    as_a_user: bool = False


COMBINATIONS = {
    # The interpreter of Triton before 3.7 can't loop to a scalar with numpy 2.4 or later.
    "torch-2.11": Combination(
        ("torch==2.11.0", "triton==3.6.0", "transformers==5.17.0", "numpy<2.4"), KERNELS
    ),
    "torch-2.15": Combination(("torch==2.15.0", "triton==3.9.0", "transformers==5.24.0"), (*KERNELS, *SHORT)),
    "transformers-4.57": Combination(("torch==2.13.0", "transformers==4.57.6"), CORE),
    "transformers-5.17": Combination(("torch==2.13.0", "transformers==5.17.0"), CORE),
    "transformers-5.23": Combination(("torch==2.13.0", "transformers==5.23.0"), CORE),
    "newest": Combination((), SHORT, as_a_user=True),
}
# `make compat` runs these: what is newest tomorrow says nothing about the code of today.
FIXED = tuple(name for name, combination in COMBINATIONS.items() if not combination.as_a_user)


@dataclass
class Result:
    """What came of one combination."""

    status: int
    tests: str
    versions: dict[str, str]


def run(name: str) -> Result:
    """Install and test one combination."""
    combination = COMBINATIONS[name]
    folder = ROOT / f".venv-compat-{name}"
    python = str(folder / "bin" / "python")
    if combination.as_a_user:
        shutil.rmtree(folder, ignore_errors=True)
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as elsewhere:
        where = Path(elsewhere) if combination.as_a_user else ROOT
        package = f"--editable={ROOT}[test]"
        if combination.as_a_user:
            # The file itself: by name, an index could bring another one.
            subprocess.run(
                [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", elsewhere, ROOT], check=True
            )
            package = f"{next(where.glob('*.whl'))}[test]"
        status = subprocess.run(
            [*pip, "install", "--quiet", *combination.requirements, package], check=False
        ).returncode
        if status:
            return Result(status, "not installed", {})
        versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
        found = dict(zip(PACKAGES, versions.split(), strict=True))
        print(", ".join(f"{package} {number}" for package, number in found.items()), flush=True)
        status, summary = _test(python, combination, where)
    return Result(status, summary, found)


def _test(python: str, combination: Combination, where: Path) -> tuple[int, str]:
    """Run the tests of a combination in the folder ``where``; exit status, and pytest's last line."""
    # From elsewhere, nothing of the checkout is found but the tests and their helpers.
    paths = ["-o", "pythonpath="] if combination.as_a_user else []
    tests = [str(ROOT / test) for test in combination.tests]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, *tests]
    process = subprocess.Popen(
        command, cwd=where, env={**os.environ, "PYTHONPATH": ""}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
    return process.wait(), re.sub(r" in [\d.]+s.*", "", last).strip("= ")


def record(name: str, result: Result) -> None:
    """Put a result among those that were recorded before, and write the table of all of them."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[name] = {
        "date": datetime.date.today().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **result.versions,
        "passed": result.status == 0,
        "tests": result.tests,
    }
    known = {each: known[each] for each in COMBINATIONS if each in known}
    RESULTS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), known), encoding="utf-8")


def with_table(text: str, known: dict[str, dict[str, str]]) -> str:
    """``text`` of the document with its table made anew."""
    columns = ("date", "python", *PACKAGES, "tests")
    lines = [f"| command | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in known.items():
        cells = [str(row.get(column, "")) for column in columns]
        lines.append(f"| `make compat-{name}` | {' | '.join(cells)} |")
    table = "\n".join(lines)
    return PLACE.sub(lambda place: f"{place[1]}{table}\n{place[2]}", text)


def main() -> int:
    """Run the named combinations, or all that are fixed; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(COMBINATIONS)}; default: all but newest"
    )
    parser.add_argument("--record", action="store_true", help="write the results into docs/compatibility.md")
    arguments = parser.parse_args()
    names = arguments.names or FIXED
    for name in names:
        if name not in COMBINATIONS:
            parser.error(f"{name!r}: expected one of {', '.join(COMBINATIONS)}")
    results = {}
    for name in names:
        print(f"{name}: {', '.join(COMBINATIONS[name].requirements) or 'no constraints'}", flush=True)
        results[name] = run(name)
        if arguments.record:  # as it comes: a later one may be broken off
            record(name, results[name])
    for name, result in results.items():
        outcome = "passed" if result.status == 0 else f"failed, exit status {result.status}"
        print(f"{name}: {outcome} ({result.tests})")
    return int(any(result.status for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
