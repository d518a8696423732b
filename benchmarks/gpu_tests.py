"""A pytest plugin for processes that share the tests which run on a GPU, the outcome of each on disk at once.

    python -m pytest -p benchmarks.gpu_tests --tasks FOLDER [--first-cases] tests/gpu/test_device.py tests/ops

A test's second case comes when all tests have had their first on every backend, and so on: whatever the time allows is
spread over all of them. --first-cases leaves it at those.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from .gpu_tasks import Outcome, Tasks


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tasks", type=Path, help="the folder that the processes share")
    parser.addoption("--first-cases", action="store_true", help="one case of every test on every backend")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SharedTests(Tasks(config.getoption("--tasks")), config.getoption("--first-cases")))


class SharedTests:
    """What one of the processes does."""

    def __init__(self, tasks: Tasks, first_cases: bool) -> None:
        self.tasks, self.first_cases = tasks, first_cases

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.tasks.begin(report.nodeid):
            self.tasks.end(report.nodeid, outcome_of([report], 0.0))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cases: Counter[tuple[str, str]] = Counter()
        ordered: list[tuple[int, pytest.Item]] = []
        for item in items:
            backend, device = backend_of(item)
            if device == "cuda":
                test = item.nodeid.partition("[")[0], backend
                ordered.append((cases[test], item))
                cases[test] += 1
        ordered.sort(key=lambda pair: pair[0])
        items[:] = [item for case, item in ordered if case == 0 or not self.first_cases]
        self.tasks.announce(item.nodeid for item in items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
        """Keeps nothing set up for the next test, which another process may take."""
        if self.tasks.begin(item.nodeid):
            reports = runtestprotocol(item, nextitem=None)
            outcome = outcome_of(reports, sum(report.duration for report in reports))
            self.tasks.end(item.nodeid, outcome)
            if outcome.result == "failed" and context_is_lost():
                os._exit(1)  # the tests after it would fail for that; another process goes on with them
        return True

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """With 0, even where tests failed: that is among their outcomes."""
        if exitstatus in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.OK


def backend_of(item: pytest.Item) -> tuple[str, str]:
    """(backend, device) of a test that is given them; everything in test_device.py is on the GPU."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if item.path.name == "test_device.py":
        return parameters.get("on_gpu", ""), "cuda"
    return parameters.get("backend", ("", ""))


def outcome_of(reports: list[pytest.TestReport] | list[pytest.CollectReport], seconds: float) -> Outcome:
    failed = [report for report in reports if report.failed]
    if failed:
        crash = getattr(failed[0].longrepr, "reprcrash", None)
        message = " ".join((crash.message if crash else failed[0].longreprtext).split())
        return Outcome("failed", message, "\n".join(report.longreprtext for report in failed), seconds)
    return Outcome("skipped" if any(report.skipped for report in reports) else "passed", seconds=seconds)


def context_is_lost() -> bool:
    import torch  # has long been, unless the test did without it

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
