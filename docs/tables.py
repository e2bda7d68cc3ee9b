"""Writes the measured tables into the documents: ``python docs/tables.py`` after new results were put in docs/results/.

A document marks the place with ``<!-- table: docs/results/NAME.json -->`` and ``<!-- end of table -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gap_triton.demo.compare import Comparison
from gap_triton.demo.coverage import coverage_markdown
from gap_triton.demo.methods import Refusal, methods_markdown
from gap_triton.demo.report import markdown_of
from gap_triton.demo.table import Row

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "docs/choosing.md",
    "docs/layers.md",
    "docs/methods.md",
    "docs/kernels.md",
    "docs/serving.md",
)

PLACE = re.compile(r"(<!-- table: (?P<file>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str, folder: Path) -> str:
    """``text`` of a document in ``folder`` with every marked table made anew from its results file."""

    def table(match: re.Match[str]) -> str:
        results = json.loads((ROOT / match["file"]).read_text(encoding="utf-8"))
        made, source = table_of(results)
        link = (ROOT / match["file"]).relative_to(folder).as_posix()
        return f"{match[1]}{made}\n*{source}; [{Path(match['file']).name}]({link}).*\n{match[3]}"

    return PLACE.sub(table, text)


def table_of(results: dict[str, Any]) -> tuple[str, str]:
    """Return the table of a results file, and where its contents come from."""
    if "copy_tb_per_s" in results:
        return path_table(results)
    if "matrix" in results:
        return serving_table(results)
    if "throughput" in results:
        return throughput_table(results)
    return kernel_table(results) if "triton" in results else demo_table(results)


def demo_table(results: dict[str, Any]) -> tuple[str, str]:
    """Return accuracies of embedded models as tables, by what was measured, and where they come from."""
    rows = [Row(**row) for row in results["rows"]]
    comparisons = [Comparison(**each) for each in results.get("comparisons", ())]
    if "refused" in results:
        made = methods_markdown(rows, comparisons, [Refusal(**each) for each in results["refused"]])
    elif comparisons:
        made = coverage_markdown(rows, comparisons)
    else:
        made = markdown_of(rows)
    versions = results["versions"]
    split = f" of the split {results['split']!r}" if "split" in results else ""
    source = (
        f"{results['samples']} held-out scenes{split}; {results['device']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )
    return made, source


def kernel_table(results: dict[str, Any]) -> tuple[str, str]:
    """Return what each kernel needs on each target as a table, and where it comes from."""
    targets = list(dict.fromkeys(row["target"] for row in results["rows"]))
    cells: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in results["rows"]:
        spilled = f", {row['spilled']} B spilled" if row["spilled"] else ""
        cell = f"{row['registers']} / {row['shared'] / 1024:.1f}{spilled}"
        kernel = row["kernel"].removesuffix("_kernel")
        cells.setdefault((kernel, row["case"], row["warps"]), {})[row["target"]] = cell
    lines = [
        f"| kernel | case | warps | {' | '.join(targets)} |",
        "|" + "---|" * (3 + len(targets)),
        *(
            f"| {kernel} | {case} | {warps} | {' | '.join(by_target.get(t, '') for t in targets)} |"
            for (kernel, case, warps), by_target in cells.items()
        ),
    ]
    return "\n".join(lines) + "\n", f"registers / KiB of shared memory; triton {results['triton']}"


def path_table(results: dict[str, Any]) -> tuple[str, str]:
    """Return what is in series when tokens are pruned, and where it comes from."""
    lines = [
        "| prompt | way | launches | programs | waves | trips in series | wide accesses, MiB | floor, MiB | floor, us |",
        "|" + "---|" * 9,
    ]
    for row in results["rows"]:
        way = f"**{row['way']}**" if row["chosen"] else row["way"]
        programs = " + ".join(f"{number:,}" for number in row["programs"])
        waves = " + ".join(f"{number:g}" for number in row["waves"])
        lines.append(
            f"| {row['case']} | {way} | {row['launches']} | {programs} | {waves} | {row['trips']} "
            f"| {row['wide_mib']:g} | {row['floor_mib']:g} | {row['floor_us']:g} |"
        )
    return "\n".join(lines) + "\n", f"counted, not timed; sm_90; triton {results['triton']}"


def serving_table(results: dict[str, Any]) -> tuple[str, str]:
    """Return how many requests an engine answered with the same tokens, and where that comes from."""
    trained = ("llava", "qwen2_5_vl")
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in results["matrix"]:
        model, engine = row["model"], row["engine"]
        if model not in trained:
            model, engine = trained[1], model if engine == "one process" else f"{model}, {engine}"
        accuracy = f" ({row['accuracy']:.3f})" if "accuracy" in row else ""
        cell = f"{row['same']} / {row['requests']}{accuracy}"
        cells.setdefault((engine, row["what"]), {})[model] = cell
    lines = [
        "| engine | kept | LLaVA | Qwen2.5-VL, or the model named |",
        "|---|---|---|---|",
        *(
            f"| {engine} | {what} | {' | '.join(by_model.get(model, '') for model in trained)} |"
            for (engine, what), by_model in cells.items()
        ),
    ]
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    source = (
        f"requests with the same tokens, of all; in brackets the accuracy on the held-out scenes; {versions}"
    )
    return "\n".join(lines) + "\n", source


def throughput_table(results: dict[str, Any]) -> tuple[str, str]:
    """Return what an engine serves relative to one that keeps everything, and where that comes from."""
    keeps = list(dict.fromkeys(row["keep"] for row in results["throughput"] if row["keep"] < 1))
    cells: dict[tuple[str, int], dict[float, str]] = {}
    for row in results["throughput"]:
        cell = f"{row['throughput']:.2f} / {row['mean_ttft']:.2f} / {row['first_ttft']:.2f}"
        cells.setdefault((row["images"], row["requests"]), {})[row["keep"]] = cell
    lines = [
        f"| images | at once | {' | '.join(f'keep={keep:g}' for keep in keeps)} |",
        "|" + "---|" * (2 + len(keeps)),
        *(
            f"| {images} | {requests} | {' | '.join(by_keep[keep] for keep in keeps)} |"
            for (images, requests), by_keep in sorted(cells.items())
        ),
    ]
    versions = ", ".join(f"{package} {number}" for package, number in results["versions"].items())
    source = (
        f"requests per second / mean time to the first token / that of the first request, relative to an engine that keeps "
        f"everything; medians of {results['turns']} turns of {results['clock']}; score {results['score']!r}; {versions}"
    )
    return "\n".join(lines) + "\n", source


if __name__ == "__main__":
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(with_tables(path.read_text(encoding="utf-8"), path.parent), encoding="utf-8")
        print(f"wrote {name}")
