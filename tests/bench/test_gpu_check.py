"""The GPU check as a program: what a step that hangs, crashes or fails costs, and what is reported."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import (
    ROOT,
    benchmark_step,
    commit,
    goals,
    gpu_check,
    gpu_tests,
    outside,
    own_steps,
    record,
    report,
    sanitizer,
)
from bench.outcome import Found, Journal, Outcome, read
from bench.outside import Ended
from bench.own_steps import MARK
from bench.step import Step, Task
from bench.steps import STEPS

GRANDCHILD = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
"""
HANGS = GRANDCHILD + "time.sleep(300)"


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def ends(pid: int) -> bool:
    """Whether a process that was killed is gone; it takes a moment."""
    deadline = time.monotonic() + 10
    while is_running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def program(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def step(name: str, code: str, limit_s: float = 20.0) -> Step:
    """A step like those of `bench.steps` that runs some code."""
    return Step(
        name,
        1,
        limit_s,
        lambda task, limit_s: program(code),
        lambda ended, task: own_steps.judge_own(name, ended),
    )


def says(**entry: object) -> str:
    return f"print({MARK + json.dumps(entry)!r}, flush=True)\n"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("cpu", tmp_path / "rows.csv", 0, tmp_path / "junit.xml")


# ------------------------------------------------------------------------------------------------ process groups
def test_a_hang_ends_with_all_that_it_started() -> None:
    start = time.monotonic()
    ended = outside.run(program(HANGS), 3)
    assert time.monotonic() - start < 15
    assert (ended.status, ended.how) == (None, "ran past 3 s")
    assert ends(int(ended.output))


def test_a_child_that_outlives_its_program_is_ended_and_not_waited_for() -> None:
    start = time.monotonic()
    ended = outside.run(program(GRANDCHILD), 30)
    assert time.monotonic() - start < 15
    assert ended.status == 0
    assert ends(int(ended.output))


def test_how_programs_end() -> None:
    killed = outside.run(program("import os; os.kill(os.getpid(), 11)"), 20)
    assert (killed.status, killed.how) == (-11, "died by SIGSEGV")
    raised = outside.run(program("raise SystemExit(7)"), 20)
    assert (raised.status, raised.how) == (7, "exit status 7")


def test_lines_are_heard_as_they_come() -> None:
    times: list[float] = []
    outside.run(
        program("import time; print(1); time.sleep(1); print(2)"),
        20,
        lambda line: times.append(time.monotonic()),
    )
    assert times[1] - times[0] > 0.8


def test_a_check_that_is_stopped_ends_its_step(tmp_path: Path) -> None:
    """By make, a time-out or a lost connection: what runs on the GPU must not be left behind."""
    code = "import signal, sys\nfrom bench import outside\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
    code += f"outside.run([sys.executable, '-c', {HANGS!r}], 100, lambda line: print(line, flush=True))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    check = subprocess.Popen(program(code), stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert check.stdout is not None
    grandchild = int(check.stdout.readline())
    assert is_running(grandchild)
    check.send_signal(signal.SIGTERM)
    check.wait(20)
    assert ends(grandchild)


# ------------------------------------------------------------------------------------------------------ the check
BAD_STEPS = [
    step("hangs", says(found={"calls": 10}) + HANGS, 3),
    step("crashes", says(found={"calls": 1}) + "import os; os.kill(os.getpid(), 11)"),
    step("raises", "raise ValueError('bad luck')"),
    step("crashes at its end", says(status="passed", message="") + "import os; os.abort()"),
    step("fails", says(status="failed", message="3 elements differ")),
    step("is silent", "pass"),
    step("can't", says(status="skipped", message="needs a wheel")),
    step("works", says(found={"error": 0.5}) + says(status="passed", message="")),
]


def test_each_failure_costs_its_own_step_only(
    tmp_path: Path, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "folder" / "results.jsonl"
    outcomes = gpu_check.check(BAD_STEPS, task, Journal(path), 100.0)
    assert {outcome.step: (outcome.status, outcome.message) for outcome in outcomes} == {
        "hangs": ("failed", "ran past 3 s"),
        "crashes": ("failed", "died by SIGSEGV"),
        "raises": ("failed", "exit status 1"),
        "crashes at its end": ("failed", "passed, then died by SIGABRT"),
        "fails": ("failed", "3 elements differ"),
        "is silent": ("failed", "ended without saying how"),
        "can't": ("skipped", "needs a wheel"),
        "works": ("passed", ""),
    }
    assert outcomes[0].found == [{"calls": 10}]
    assert "bad luck" in outcomes[2].output
    _, again = read([path])
    assert [(each.step, each.status, each.message, each.found) for each in again] == [
        (each.step, each.status, each.message, each.found) for each in outcomes
    ]
    assert "bad luck" in again[2].output
    assert "[8/8] works ..." in capsys.readouterr().out


def test_what_a_step_finds_is_in_the_file_while_it_runs(tmp_path: Path, task: Task) -> None:
    path = tmp_path / "results.jsonl"
    seen = f"""
from pathlib import Path
import time
for _ in range(100):
    time.sleep(0.05)
    if "first" in Path({str(path)!r}).read_text():
        print({MARK!r} + '{{"status": "passed", "message": ""}}')
        break
"""
    (outcome,) = gpu_check.check([step("looks", says(found={"first": 1}) + seen)], task, Journal(path), 50.0)
    assert outcome.status == "passed"


def test_a_file_that_breaks_off_says_in_which_step(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    journal = Journal(path)
    journal.write(run={"commit": "c", "device": "cuda"})
    journal.write(begins="one")
    journal.ended(Outcome("one", "passed"))
    journal.write(begins="two")
    journal.write(step="two", found={"calls": 1})
    runs, (one, two) = read([path])
    assert runs == [{"commit": "c", "device": "cuda"}]
    assert (one.status, two.status) == ("passed", "failed")
    assert (two.message, two.found) == ("the check was stopped while it ran", [{"calls": 1}])


def test_steps_for_which_no_time_is_left_are_skipped(tmp_path: Path, task: Task) -> None:
    (outcome,) = gpu_check.check([BAD_STEPS[-1]], task, Journal(tmp_path / "results.jsonl"), 6.0)
    assert (outcome.status, outcome.message) == (
        "skipped",
        "no time is left: raise --budget, or name it with --only",
    )


def test_the_steps_of_both_parts_are_there_once() -> None:
    assert len(set(gpu_check.NAMES)) == len(gpu_check.NAMES)
    assert set(STEPS) < set(gpu_check.NAMES)
    first = [found.name for found in gpu_check.chosen_steps(None, 1)]
    assert first[:3] == ["probe", "select", "tickets"]
    assert [*first, *(found.name for found in gpu_check.chosen_steps(None, 2))] == list(gpu_check.NAMES)
    assert [found.name for found in gpu_check.chosen_steps("graphs,select", None)] == ["select", "graphs"]


def test_without_a_gpu_what_needs_one_is_skipped_with_a_reason(task: Task) -> None:
    reasons = {found.name: found.why_not(task) for found in gpu_check.STEPS}
    assert reasons["kernel-tests"] == "each of these tests needs a CUDA GPU, this is cpu"
    assert reasons["synccheck"] == "compute-sanitizer needs a CUDA GPU, this is cpu"
    on_gpu = replace(task, device="cuda")
    assert not gpu_check.STEPS[0].why_not(on_gpu)
    by_name = {found.name: found for found in gpu_check.STEPS}
    assert by_name["tickets"].environment(task) == {"TRITON_INTERPRET": "1"}
    assert by_name["tickets"].environment(on_gpu) == {"TRITON_INTERPRET": "0"}
    assert by_name["relaunch"].command(replace(task, relaunches=7), 30)[-2:] == ["--relaunches", "7"]


def test_without_triton_its_kernels_are_skipped(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = {found.name: found.why_not(task) for found in gpu_check.STEPS}
    assert reasons["tickets"] == "Triton is not installed"
    assert reasons["float64"] == ""


# --------------------------------------------------------------------------------------------- the command line
def run(*arguments: str, **environment: str):
    return CliRunner().invoke(gpu_check.app, list(arguments), env=environment)


def test_the_command_runs_a_step_and_prints_the_tables(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    result = run("--device", "cpu", "--only", "select,graphs", "--output", str(path))
    assert result.exit_code == 0, result.output
    assert "No GPU: times are those of a CPU, on tiny shapes" in result.output
    assert "not measured" in result.output
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["run"]["device"] == "cpu"
    assert lines[0]["run"]["steps"] == ["select", "graphs"]
    assert lines[-1]["ended"]["skipped"] == ["graphs"]
    again = run("--table", str(path))
    assert again.exit_code == 0
    assert "a CUDA graph needs CUDA, this is cpu" in again.output


def test_a_failure_is_in_the_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "STEPS", BAD_STEPS[4:5])
    monkeypatch.setattr(gpu_check, "NAMES", ("fails",))
    path = tmp_path / "results.jsonl"
    result = run("--device", "cpu", "--output", str(path))
    assert result.exit_code == 1
    assert "3 elements differ" in result.output
    assert json.loads(path.read_text().splitlines()[-1])["ended"]["failed"] == ["fails"]
    assert run("--table", str(path)).exit_code == 1


def test_wrong_options_are_named() -> None:
    for arguments, expected in (
        (("--only", "graph"), "--only graph: expected one of probe, select"),
        (("--part", "3"), "--part 3: expected 1 or 2"),
    ):
        result = run("--device", "cpu", *arguments)
        assert result.exit_code == 2
        assert expected in " ".join(result.output.replace("│", " ").split())


def test_the_commit_is_an_argument_where_git_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(commit.COMMIT, raising=False)
    monkeypatch.setattr(commit, "ROOT", tmp_path)
    monkeypatch.setattr(commit, "output_of", lambda *command: "fromgit")
    assert commit.commit() == "unknown"
    monkeypatch.setenv(commit.COMMIT, "abc123")
    assert commit.commit() == "abc123"
    (tmp_path / ".git").mkdir()
    assert commit.commit() == "fromgit"


def test_the_check_itself_loads_no_torch() -> None:
    """Nothing that a GPU does can then end it."""
    ended = outside.run(program("import sys, bench.gpu_check; print('torch' in sys.modules)"), 60)
    assert ended.output.strip() == "False"


# ------------------------------------------------------------------------------------------------------ the goals
def rows(launches: float) -> list[Found]:
    shared = {
        "operator": "prune_tokens",
        "shape": "llava-1.5",
        "batch": 1,
        "dtype": "bfloat16",
        "mode": "graph",
    }
    shared |= {"p20_us": 9.0, "p80_us": 11.0, "bytes": 10, "flops": 0, "floor_us": 8.0, "ratio": 1.25}
    return [
        {"row": {**shared, "implementation": "triton", "median_us": 10.0, "launches": launches}},
        {"row": {**shared, "implementation": "several launches", "median_us": 8.0, "launches": 5.0}},
    ]


def test_goals_are_judged_step_by_step_and_never_on_a_cpu() -> None:
    timing = {"model": "llama-7b", "visual": 576, "keep": 0.5, "mode": "eager", "what": "prefill"}
    times = [
        {"timing": {**timing, "way": way, "median_us": us}}
        for way, us in (("pruned", 100.0), ("oracle", 99.0))
    ]
    outcomes = [
        Outcome("one-or-several", "passed", found=rows(1.0)),
        Outcome("end-to-end", "passed", found=times),
    ]
    judged = report.verdicts(outcomes, on_gpu=True)
    said = {(step, verdict.goal): report.by_how_much(verdict) for step, verdict in judged}
    assert said["one-or-several", "prune_tokens is one launch"] == "met"
    assert said["one-or-several", "prune_tokens is as fast as by several launches"] == "missed by 19%"
    assert said["end-to-end", "a pruned prefill takes at most 5% longer than the oracle's"] == "met"
    assert said["", "prune_tokens is 30 times as fast as FastV's way"] == "not measured"
    assert {verdict.goal for _, verdict in judged} == {goal.text for goal in goals.GOALS}
    on_cpu = report.verdicts(outcomes, on_gpu=False)
    assert {report.by_how_much(verdict) for _, verdict in on_cpu} == {"not measured"}
    console = Console(width=200)
    with console.capture() as capture:
        console.print(report.goals_table(judged))
        console.print(report.steps_table(outcomes, "title"))
        console.print(report.models_table(outcomes, on_gpu=False))
    assert "llama-7b, 576 tokens, keep 0.5" in capture.get()
    assert "on a CPU: not a GPU's times" in capture.get()
    assert not report.models_table(outcomes[:1], on_gpu=True).rows


# ----------------------------------------------------------------------------------------- programs of others
TESTS = """
import pytest

def test_right(): pass

def test_wrong(): assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="not here")
def test_elsewhere(): pass
"""


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting several takes longer than these tests."""
    monkeypatch.setattr(gpu_tests, "side_by_side", list)


def run_tests(task: Task, *arguments: str) -> Outcome:
    """A step of tests, on what stands for a GPU."""
    tests = gpu_tests.tests("tests", 1, 60, ("--noconftest", *arguments))
    return tests.judge(outside.run(tests.command(task, 60), 60), task)


@pytest.mark.usefixtures("one_process")
def test_tests_are_counted(tmp_path: Path, task: Task) -> None:
    (tmp_path / "test_made.py").write_text(TESTS)
    outcome = run_tests(task, str(tmp_path / "test_made.py"))
    assert outcome.status == "failed"
    (found,) = outcome.found
    assert [found[kind] for kind in ("passed", "failed", "skipped")] == [1, 1, 1]
    (failing,) = found["failing"]
    assert failing["name"].endswith("::test_wrong")
    assert "one is not two" in failing["message"]
    assert run_tests(task, str(tmp_path / "test_made.py"), "-k", "right").status == "passed"


@pytest.mark.usefixtures("one_process")
def test_tests_that_break_or_find_nothing_have_not_passed(tmp_path: Path, task: Task) -> None:
    outcome = run_tests(task, str(tmp_path / "nowhere.py"))
    assert outcome.status == "failed"
    assert "nowhere" in outcome.message
    assert gpu_tests.judge_tests("tests", Ended(0, "", 9), task.junit, []).message == "nothing ran"
    assert gpu_tests.judge_tests("tests", Ended(None, "", 9), task.junit, []).message == "ran past 9 s: "


@pytest.mark.parametrize(
    ("tool", "output", "status", "message"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", "passed", ""),
        ("memcheck", "ERROR SUMMARY: 3 errors", "failed", "reports 3 problems"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed", ""),
        ("racecheck", "RACECHECK SUMMARY: 2 hazards displayed", "failed", "reports 2 problems"),
        ("racecheck", "ERROR SUMMARY: 0 errors", "failed", "printed no summary, exit status 0"),
        ("synccheck", "ERROR SUMMARY: 0 errors", "passed", ""),
        ("synccheck", "ERROR SUMMARY: 1 error", "failed", "reports 1 problems"),
        ("synccheck", "Device not supported", "skipped", "compute-sanitizer does not support this device"),
    ],
)
def test_sanitizer(tool: str, output: str, status: str, message: str) -> None:
    called = f"prune_tokens, tiny, torch.float32\n{sanitizer.FINAL_LINE}\n"
    outcome = sanitizer.judge_sanitizer(tool, Ended(0, called + output, 60))
    assert (outcome.status, outcome.message) == (status, message)
    if status == "passed":
        assert outcome.found == [{"problems": 0, "calls": 1}]
        outcome = sanitizer.judge_sanitizer(tool, Ended(0, output, 60))
        assert "not every operator was called" in outcome.message
        outcome = sanitizer.judge_sanitizer(tool, Ended(None, output, 60))
        assert outcome.message == "ran past 60 s, after 0 calls"


def test_without_a_sanitizer_nothing_passes(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    memcheck = sanitizer.sanitizer("memcheck", 2, 60)
    assert memcheck.why_not(replace(task, device="cuda")) == "compute-sanitizer is not on the PATH"


def test_benchmarks_that_are_cut_short_leave_their_rows(task: Task) -> None:
    benchmarks = benchmark_step.benchmarks(2, 60)
    assert benchmarks.judge(Ended(0, "", 60), task).message == "nothing was timed"
    machine = record.Machine(*("-" for _ in fields(record.Machine)))
    for found in rows(1.0):
        record.append(task.csv, machine, record.Row(**found["row"]))
    outcome = benchmarks.judge(Ended(0, "", 60), task)
    assert (outcome.status, outcome.found) == ("passed", rows(1.0))
    outcome = benchmarks.judge(Ended(None, "", 60), task)
    assert (outcome.status, outcome.found) == ("failed", rows(1.0))
    assert outcome.message == "ran past 60 s; the 2 rows up to then count"
    outcome = benchmarks.judge(Ended(1, "FAILED bench/test_prune.py::test - AssertionError", 60), task)
    assert (outcome.status, outcome.message) == (
        "failed",
        "FAILED bench/test_prune.py::test - AssertionError",
    )
    assert not benchmarks.judge(Ended(None, "", 60), replace(task, rows_before=2)).found
