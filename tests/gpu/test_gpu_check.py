"""make gpu-check without a GPU: what it would run and for how long, what it writes, and that it says there is none."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_measure, gpu_problems, gpu_results, gpu_stack
from benchmarks.gpu_results import FAILED, NOT_FINISHED, NOT_RUN, PASSED, Results, step_of
from benchmarks.gpu_tasks import Crew, Ended, Outcome, Tasks, run, work
from essa_kernels import dispatch

SHRINK = 32
DONE = Outcome("passed", seconds=1.0)


@pytest.fixture(autouse=True)
def without_grad():
    with torch.inference_mode():
        yield


def fake_measure(calls, found):
    """Runs every call and says that one took 2 ms, 1 ms in a graph."""
    for call in calls:
        call()
    found |= {"launched_s": 2e-3, "graph_s": 1e-3}


def test_every_op_has_problems():
    assert set(gpu_problems.problems(SHRINK)) == set(dispatch.OPS)
    for op, sizes in gpu_problems.problems().items():
        assert sizes, op
        assert all(problem.moved > 0 for problem in sizes), op
        assert len({problem.what for problem in sizes}) == len(sizes), op
    assert any("in lists" in problem.what for problem in gpu_problems.problems()["multi_lora"])


def test_measurements_of_fake_times(tmp_path, native):
    tasks = Tasks(tmp_path)
    tasks.do(gpu_measure.measurements("cpu", fake_measure, SHRINK), after_failure=lambda: None)
    outcomes = tasks.outcomes()
    assert {outcome.message for outcome in outcomes.values()} == {""}
    results = Results(tmp_path / "check", "A card")
    results.measured(outcomes)
    results.write()

    assert results.ceilings["flops_per_s"] == pytest.approx(2 * (8192 // SHRINK) ** 3 / 1e-3)
    assert {row["op"] for row in results.ops} == set(dispatch.OPS)
    (row,) = (row for row in results.ops if row["op"] == "gaussian")
    assert row["normals_per_s"] == pytest.approx(2**28 / SHRINK**2 / 1e-3)
    assert row["times_floor"] == pytest.approx(results.ceilings["bytes_per_s"] / row["moved_per_s"])
    assert {row["what"] for row in results.layers} == {gpu_results.PURE, *gpu_stack.METHODS}
    assert all(row["launched_share"] == row["graph_share"] == 1.0 for row in results.layers)

    assert len(json.loads((tmp_path / "check.json").read_text())["ops"]) == len(results.ops)
    table = (tmp_path / "check.md").read_text()
    assert table.startswith("# A card\n")
    for row in results.ops:
        assert f"| {row['op']} | {row['backend']} | {row['what']} | 2000.0 | 1000.0 |" in table
    assert "| pure inference | 512 | 2.000 | 100.0% | 1.000 | 100.0% |" in table


def test_populations_compute_what_the_layers_do(seed, native):
    """The ways to run one population agree with each other, so that their times can be compared."""
    stack = gpu_stack.Stack("cpu", SHRINK)
    x, offsets = torch.randn(64, stack.hidden, dtype=gpu_problems.DTYPE), torch.arange(65)
    outputs = {name: stack.forward(x, offsets, method).float() for name, method in gpu_stack.METHODS.items()}
    populations = {}
    for name, output in outputs.items():
        distribution = next((d for d in gpu_problems.DISTRIBUTIONS if name.endswith(d)), "")
        populations.setdefault((name.partition("_")[0], distribution), []).append(output)
    assert sorted(map(len, populations.values())) == [2, 2, 2, 2, 4]
    for first, *others in populations.values():
        for other in others:
            assert (other - first).abs().mean() < 0.05 * first.abs().mean()


# Measurements that fail


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    def no_graph(calls, found):
        found["launched_s"] = 2e-3
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    works = [
        (gpu_results.CEILINGS, lambda found: found.update(bytes_per_s=1e12, flops_per_s=1e14)),
        *gpu_measure.layers("cpu", no_graph, SHRINK)[:1],
    ]
    tasks, failures = Tasks(tmp_path), []
    tasks.do(works, after_failure=functools.partial(failures.append, "synchronised"))
    assert failures == ["synchronised"]
    results = Results(tmp_path / "check", "A card")
    results.measured(tasks.outcomes())
    results.add_failures("measurements", tasks.outcomes(), [])
    results.write()
    assert "| pure inference | 64 | 2.000 | 100.0% | - | - |" in (tmp_path / "check.md").read_text()
    assert "| measurements: pure inference, 64 rows | when stream is capturing |" in (tmp_path / "check.md").read_text()
    assert "Traceback" in (tmp_path / "check.log").read_text()


# Processes that share tasks

PROGRAM = """
import os, sys, time
from pathlib import Path
from benchmarks.gpu_tasks import Tasks

def lose_the_context():
    raise SystemExit(1)

works = {
    "fine": lambda found: found.update(it=1),
    "raises": lambda found: 1 / 0,
    "dies": lambda found: os._exit(3),
    "hangs": lambda found: time.sleep(60),
    "fine too": lambda found: None,
}
Tasks(Path(sys.argv[1])).do(list(works.items()), after_failure=lose_the_context)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_takes_its_process_down_takes_no_other_along(tmp_path, workers):
    tasks = Tasks(tmp_path / "tasks")
    crew = Crew([sys.executable, "-c", PROGRAM, tasks.folder], tasks, workers)
    processes = work([crew], limit_s=60, task_s=1.5)
    outcomes = tasks.outcomes()
    assert {name: (outcome.result, outcome.message) for name, outcome in outcomes.items()} == {
        "fine": ("passed", ""),
        "raises": ("failed", "ZeroDivisionError: division by zero"),
        "dies": ("failed", "its process ended with status 3"),
        "hangs": ("failed", "not done after 2 s"),
        "fine too": ("passed", ""),
    }
    assert outcomes["fine"].found == {"it": 1}
    statuses = [ended.status for _, ended in processes]
    assert sorted(statuses, key=str) == sorted([1, 3, None, *[0] * workers], key=str)


def test_the_time_ends_what_still_runs(tmp_path):
    tasks = Tasks(tmp_path / "tasks")
    program = PROGRAM.replace("1 / 0", "None").replace("os._exit(3)", "None")
    start = time.monotonic()
    crew = Crew([sys.executable, "-c", program, tasks.folder], tasks, 1)
    ((_, ended),) = work([crew], limit_s=4, task_s=60)
    assert time.monotonic() - start < 20
    assert ended.status is None
    step = step_of("tasks", tasks.outcomes(), [ended], 2.0)
    assert (step.result, step.summary) == (NOT_FINISHED, "3 of 5 passed, 1 cut short, 1 not run")


def test_a_crew_that_never_begins_is_not_called_again(tmp_path):
    crew = Crew([sys.executable, "-c", "raise SystemExit('no such module')"], Tasks(tmp_path / "tasks"), 2)
    processes = work([crew], limit_s=60, task_s=60)
    assert [ended.status for _, ended in processes] == [1, 1]
    step = step_of("tasks", crew.tasks.outcomes(), [ended for _, ended in processes], 1.0)
    assert (step.result, step.summary) == (FAILED, "0 of 0 passed, no such module")


def test_a_program_is_stopped_with_all_it_has_started(tmp_path):
    ticks = tmp_path / "ticks"
    program = f"import subprocess; subprocess.run(['sh', '-c', 'while true; do echo >> {ticks}; sleep 0.1; done'])"
    ended = run([sys.executable, "-c", program], 3, tmp_path / "log")
    assert ended.status is None
    ticked = ticks.read_text()
    time.sleep(0.5)
    assert ticks.read_text() == ticked


def test_a_program_that_ends(tmp_path):
    ended = run([sys.executable, "-c", "import os; print(os.environ['WORD'])"], 60, tmp_path / "log", WORD="done")
    assert (ended.status, ended.output) == (0, "done\n")


# Tests

TESTS = """
    import os, pytest, time

    @pytest.fixture(params=[("triton", "cuda"), ("cpu", "cpu")], ids="-".join)
    def backend(request):
        return request.param

    @pytest.mark.parametrize("n", range(4))
    def test_values(backend, n):
        if n == 1:
            pytest.skip("not here")
        if n == 2:
            os._exit(5)
        assert n != 3, "three"

    def test_once(backend):
        pass

    def test_without_backend():
        raise AssertionError
"""


def shared(tests, *options, workers=2):
    tasks = Tasks(tests.parent / "tasks")
    command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "--tasks", tasks.folder, *options]
    crew = Crew([*command, "-p", "no:cacheprovider", "--continue-on-collection-errors", tests], tasks, workers)
    processes = work([crew], limit_s=100, task_s=60)
    return {name.partition("::")[2]: outcome for name, outcome in tasks.outcomes().items()}, processes


def test_processes_share_the_tests_of_a_gpu(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_op.py").write_text(textwrap.dedent(TESTS))
    (tmp_path / "tests" / "test_broken.py").write_text("import no_such_module")
    outcomes, processes = shared(tmp_path / "tests")
    assert {test: outcome.result for test, outcome in outcomes.items()} == {
        "test_values[triton-cuda-0]": "passed",
        "test_once[triton-cuda]": "passed",
        "test_values[triton-cuda-1]": "skipped",
        "test_values[triton-cuda-2]": "failed",
        "test_values[triton-cuda-3]": "failed",
        "": "failed",
    }
    assert list(outcomes)[:2] == ["test_values[triton-cuda-0]", "test_once[triton-cuda]"]
    assert outcomes["test_values[triton-cuda-2]"].message == "its process ended with status 5"
    assert outcomes["test_values[triton-cuda-3]"].message == "AssertionError: three assert 3 != 3"
    assert "No module named 'no_such_module'" in outcomes[""].message
    assert sorted(ended.status for _, ended in processes) == [0, 0, 5]


def test_first_cases(tmp_path):
    (tmp_path / "test_op.py").write_text(textwrap.dedent(TESTS))
    outcomes, _ = shared(tmp_path / "test_op.py", "--first-cases", workers=1)
    assert outcomes.keys() == {"test_values[triton-cuda-0]", "test_once[triton-cuda]"}


# Steps


@pytest.mark.parametrize(
    ("outcomes", "statuses", "result", "summary"),
    [
        ([DONE, DONE, Outcome("skipped")], [0], PASSED, "2 of 3 passed, 1 skipped"),
        ([Outcome("skipped")], [0], NOT_RUN, "0 of 1 passed, 1 skipped"),
        ([DONE, Outcome("failed"), None], [None], FAILED, "1 of 3 passed, 1 failed, 1 not run"),
        ([DONE, Outcome(), None], [], NOT_FINISHED, "1 of 3 passed, 1 cut short, 1 not run"),
        ([None, None], [], NOT_RUN, "0 of 2 passed, 2 not run"),
        ([DONE], [1], FAILED, "1 of 1 passed, why"),
        ([], [0], NOT_RUN, "0 of 0 passed"),
        ([], [2], FAILED, "0 of 0 passed, why"),
        ([], [None], NOT_FINISHED, "0 of 0 passed"),
    ],
)
def test_tasks_as_a_step(outcomes, statuses, result, summary):
    processes = [Ended(status, "begun\n=== why ===\n\n", 1.0) for status in statuses]
    step = step_of("step", dict(enumerate(outcomes)), processes, 3.0)
    assert (step.result, step.summary) == (result, summary)


# The whole

STEPS = ["build", "first case of every test", "each op once", "measurements"]
SANITIZERS = ["compute-sanitizer memcheck", "compute-sanitizer racecheck"]
FILES = ["first cases of noise", "tests of noise"]


class Rehearsal:
    """The check by a clock of its own, with processes that take as long as they are told."""

    def __init__(self, monkeypatch, path):
        self.now, self.seconds, self.statuses = 0.0, 10.0, {"on": 0, "off": 0}
        self.limits, self.written = [], []
        self.results = Results(path / "check", "A card")
        monkeypatch.setattr(gpu_check, "SANITIZER", "compute-sanitizer")
        monkeypatch.setattr(gpu_check, "run", self.build)
        monkeypatch.setattr(gpu_check, "work", self.work)
        self.check = gpu_check.Check(self.results, path / "tasks", workers=16, clock=lambda: self.now)

    def build(self, command, limit_s, log, ESSA_CUDA):
        return self.program(limit_s, self.statuses[ESSA_CUDA])

    def work(self, crews, limit_s, task_s):
        self.written.append(json.loads(self.results.path.with_suffix(".json").read_text())["steps"])
        ended = self.program(limit_s, 0)
        for crew in crews:
            crew.tasks.announce(["tests/ops/test_noise.py::one", "tests/ops/test_noise.py::two"])
            for name in ["tests/ops/test_noise.py::one", "tests/ops/test_noise.py::two"][: 1 + (ended.status == 0)]:
                crew.tasks.begin(name)
                crew.tasks.end(name, DONE)
        return [(crew, ended) for crew in crews]

    def program(self, limit_s, status):
        self.limits.append(limit_s)
        seconds = min(limit_s, self.seconds)
        self.now += seconds
        return Ended(status if seconds < limit_s else None, "output", seconds)

    def run(self):
        self.check.run()
        assert json.loads(self.results.path.with_suffix(".json").read_text())["steps"] == [
            vars(step) for step in self.results.steps.values()
        ]
        return {step.name: step.result for step in self.results.steps.values()}


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    return Rehearsal(monkeypatch, tmp_path)


def test_a_check_with_time_to_spare(rehearsal):
    assert rehearsal.run() == dict.fromkeys([*STEPS, *SANITIZERS, "all tests", *FILES], PASSED)
    assert rehearsal.limits == [100, 90, 490, 110, 470]


def test_each_step_is_on_disk_before_the_next_begins(rehearsal):
    rehearsal.run()
    passed = [{step["name"] for step in steps if step["result"] == PASSED} for steps in rehearsal.written]
    assert passed == [{"build"}, {*STEPS[:3], FILES[0]}, {*STEPS, FILES[0]}, {*STEPS, *SANITIZERS, FILES[0]}]


def test_a_check_that_is_too_slow_measures_and_ends_in_time(rehearsal):
    rehearsal.seconds = 1e6
    results = rehearsal.run()
    assert results.pop("build without CUDA kernels") == NOT_FINISHED
    cut, left = dict.fromkeys([*STEPS, FILES[0]], NOT_FINISHED), dict.fromkeys([*SANITIZERS, "all tests"], NOT_RUN)
    assert results == cut | left
    assert rehearsal.limits == [100, 50, 90, 270]
    assert rehearsal.results.steps["measurements"].summary == "1 of 2 passed, 1 not run"
    assert rehearsal.now == gpu_check.TOTAL_S < 9 * 60 - 2 * 10


def test_triton_is_checked_where_the_cuda_kernels_do_not_build(rehearsal):
    rehearsal.statuses["on"] = 1
    results = rehearsal.run()
    assert results.pop("build") == FAILED
    assert set(results.values()) == {PASSED}
    assert "build without CUDA kernels" in results


def test_a_step_that_cannot_be_run_takes_no_other_along(rehearsal, monkeypatch):
    def first():
        raise OSError("no space left")

    monkeypatch.setattr(rehearsal.check, "first", first)
    results = rehearsal.run()
    assert results["first"] == FAILED
    assert results["measurements"] == results["all tests"] == PASSED


def test_a_missing_sanitizer_is_said(rehearsal, monkeypatch):
    monkeypatch.setattr(gpu_check, "SANITIZER", None)
    results = rehearsal.run()
    assert [results[name] for name in SANITIZERS] == [NOT_RUN, NOT_RUN]
    assert rehearsal.results.steps[SANITIZERS[0]].summary == "compute-sanitizer was not found"


def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--results", str(tmp_path / "check")]
    root = Path(gpu_check.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU" in done.stderr
    assert not list(tmp_path.iterdir())
