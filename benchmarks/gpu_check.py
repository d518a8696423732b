"""Everything a GPU can show, in one command of less than nine minutes: make gpu-check

In this order, each with what is left of the time:

1. builds the extension with its CUDA kernels, or, if that fails, without them;
2. runs one case of every test of the ops on every backend of the GPU, and each op once at the sizes to be measured;
3. measures: each op against this card's own copy bandwidth and matrix product, and a population over the layers of a
   7B-shaped model against those layers alone;
4. runs each op once, small, under compute-sanitizer;
5. runs all tests of the ops on the GPU.

Writes results/gpu_check.json, .md and .log after each. Exits with 1 where there is no GPU, or unless all has passed: what
is cut short says NOT FINISHED, what is not begun NOT RUN.

Most of the tests' time is Triton's: some 950 kernels, of which the first cases take 150, that each took 0.3 to 0.9 s of CPU
time to compile for sm_90 where this was written. Predicted from that, for 16 cores: 40 s for the build, 35 for the first
cases, 80 for the measurements, 60 for compute-sanitizer and 80 for all tests, five minutes together.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from .gpu_results import FAILED, NOT_FINISHED, NOT_RUN, PASSED, Results, Step, step_of
from .gpu_tasks import ROOT, Crew, Outcome, Tasks, last_line, run, work

RESULTS = ROOT / "benchmarks" / "results" / "gpu_check"
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
TOOLS = ("memcheck", "racecheck")

# Seconds.
TOTAL_S = 510  # what is stopped then is gone and written down within ten more
BUILD_S, FIRST_S, SANITIZER_S = 150, 90, 110  # at most; the measurements, and then all tests, take what is left
BUILD_WITHOUT_CUDA_S = 50  # of those, kept for a second try
LEAST_S = 15  # in less, no process gets to its first task
TASK_S = 60  # one test or measurement
GPU_BYTES_EACH = 4 << 30  # of a process
MOST_WORKERS = 16


class Check:
    """The steps of the check. Each takes of the time together what it needs and is allowed."""

    def __init__(
        self, results: Results, folder: Path, workers: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.results, self.folder, self.workers, self.clock = results, folder, workers, clock
        self.end = clock() + TOTAL_S
        sanitizers = (f"compute-sanitizer {tool}" for tool in TOOLS)
        for name in ("build", "first case of every test", "each op once", "measurements", *sanitizers, "all tests"):
            results.steps[name] = Step(name)

    def run(self) -> None:
        """All of them, what would be missed least the last. One that cannot be run takes no other along."""
        for step in (self.build, self.first, self.measure, self.sanitize, self.all_tests):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - there may be no second try
                traceback.print_exc()
                self.results.add(Step(step.__name__, FAILED, f"{type(error).__name__}: {error}"))
            self.results.write()

    def build(self) -> None:
        """Without CUDA kernels if need be: Triton's serve every op."""
        end = self.clock() + self.left(BUILD_S)
        for name, cuda in (("build", "on"), ("build without CUDA kernels", "off")):
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            limit_s = end - self.clock() - (BUILD_WITHOUT_CUDA_S if cuda == "on" else 0)
            ended = run(command, limit_s, self.folder / "build.log", ESSA_CUDA=cuda)
            result = {0: PASSED, None: NOT_FINISHED}.get(ended.status, FAILED)
            self.results.add(Step(name, result, last_line(ended.output), ended.seconds))
            self.results.add_failures(name, {}, [ended])
            if ended.status == 0:
                break

    def first(self) -> None:
        """Also compiles, in several processes, the Triton kernels that are measured next."""
        callers = max(1, self.workers // 3)
        testers = self.testers("first", max(1, self.workers - callers), "--first-cases")
        once = Tasks(self.folder / "once")
        command = [sys.executable, "-m", "benchmarks.gpu_problems", once.folder, "--shrink", "1"]
        self.work({"first case of every test": testers, "each op once": Crew(command, once, callers)}, FIRST_S)
        self.add_files("first cases", testers.tasks)

    def measure(self) -> None:
        tasks = Tasks(self.folder / "measurements")
        self.work({"measurements": Crew([sys.executable, "-m", "benchmarks.gpu_measure", tasks.folder], tasks, 1)})
        self.results.measured(tasks.outcomes())

    def sanitize(self) -> None:
        crews = {}
        for tool in TOOLS:
            tasks = Tasks(self.folder / tool)
            program = [sys.executable, "-m", "benchmarks.gpu_problems", tasks.folder, "--shrink", "32"]
            options = ["--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"]
            command = [SANITIZER or "", *options, *program]
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            crews[f"compute-sanitizer {tool}"] = Crew(command, tasks, max(1, self.workers // 4), environment)
        if SANITIZER is None:
            for name in crews:
                self.results.add(Step(name, NOT_RUN, "compute-sanitizer was not found"))
        else:
            self.work(crews, SANITIZER_S)

    def all_tests(self) -> None:
        testers = self.testers("tests", self.workers)
        self.work({"all tests": testers})
        self.add_files("tests", testers.tasks)

    def testers(self, folder: str, workers: int, *options: str) -> Crew:
        tasks = Tasks(self.folder / folder)
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_tests", "--tasks", tasks.folder, *options]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["--ignore", "tests/ops/test_multi_lora_in_peft.py"]  # on the CPU alone, and slow to import
        command += ["tests/gpu/test_device.py", "tests/ops"]
        return Crew(command, tasks, workers, {"OMP_NUM_THREADS": "1"})

    def work(self, crews: dict[str, Crew], most: float = TOTAL_S) -> None:
        """A step for each crew."""
        start, limit_s = self.clock(), self.left(most)
        if limit_s < LEAST_S:
            return
        processes = work(list(crews.values()), limit_s, TASK_S)
        for name, crew in crews.items():
            outcomes, ended = crew.tasks.outcomes(), [ended for of, ended in processes if of is crew]
            self.results.add(step_of(name, outcomes, ended, self.clock() - start))
            self.results.add_failures(name, outcomes, ended)

    def add_files(self, what: str, tests: Tasks) -> None:
        """A step for each file of tests."""
        files: dict[str, dict[str, Outcome | None]] = {}
        for test, outcome in tests.outcomes().items():
            files.setdefault(Path(test.partition("::")[0]).stem.removeprefix("test_"), {})[test] = outcome
        for file, outcomes in sorted(files.items()):
            seconds = sum(outcome.seconds for outcome in outcomes.values() if outcome)
            self.results.add(step_of(f"{what} of {file}", outcomes, [], seconds))

    def left(self, most: float) -> float:
        return min(most, self.end - self.clock())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="write PATH.json, .md and .log (default: %(default)s)"
    )
    path = parser.parse_args().results
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU, nothing was checked", file=sys.stderr)
        return 1
    seed = os.environ.setdefault("ESSA_TEST_SEED", str(secrets.randbits(32)))
    gpu = torch.cuda.get_device_properties(0)
    device = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, torch {torch.__version__}, ESSA_TEST_SEED={seed}"
    results = Results(path, device)
    workers = max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS, gpu.total_memory // GPU_BYTES_EACH))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Check(results, Path(folder), workers).run()
    print(results.as_markdown())
    return 0 if all(step.result == PASSED for step in results.steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
