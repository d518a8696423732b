"""Every benchmark compares itself with a named rival in the same process; the table at the end shows the ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import essa_kernels
from essa_kernels import env_report

from .compare import Comparison, Peak

COMPARISONS: list[Comparison | Peak] = []
REMARKS: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="also write the table to PATH.json and PATH.md")
    parser.addoption("--threads", type=int, default=1, help="threads of torch and of our kernels (default: 1)")


@pytest.fixture(autouse=True)
def setting(request: pytest.FixtureRequest):
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def record():
    """Keep a comparison for the table."""
    return COMPARISONS.append


@pytest.fixture
def remark():
    """Keep a sentence to stand below the table: what its numbers do not say."""
    return lambda text: None if text in REMARKS else REMARKS.append(text)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not COMPARISONS:
        return
    table = as_table(config.getoption("--threads"))
    terminalreporter.write_sep("=", "ratios")
    terminalreporter.write_line(table)
    if path := config.getoption("--results"):
        results = {
            "threads": config.getoption("--threads"),
            "rows": [comparison.as_dict() for comparison in COMPARISONS],
            "remarks": REMARKS,
            "environment": _environment(),
        }
        path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".md").write_text(table + "\n")


def _environment() -> dict:
    """The report of this environment, without the folder where this machine keeps its thread pool."""
    report = env_report()
    if pool := report["compiled_module"].get("thread_pool"):
        report["compiled_module"]["thread_pool"] = Path(pool).name
    return report


def as_table(threads: int) -> str:
    report = env_report()
    isa = report["compiled_module"].get("cpu_isa", "no compiled kernels")
    header = (
        f"essa-kernels {essa_kernels.__version__}, torch {torch.__version__}, {report['cpu']['model']} ({isa}), "
        f"{threads} thread{'s'[: threads > 1]}"
    )
    lines = [header, "", "| what | ours | rival | rival's time | ratio (quartiles) |", "|---|---|---|---|---|"]
    lines += [comparison.as_row() for comparison in COMPARISONS]
    return "\n\n".join(["\n".join(lines), *REMARKS])
