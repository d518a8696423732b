"""A run on Ray whose workers and drivers are killed at random moments goes on where it was, to the same bits."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import time
from pathlib import Path

import pytest
from essa.checkpoint import HISTORY_FILE, RUN_FILE, Run

from .ray_workers import replicas
from .test_faults import adapter, generations, in_a_child

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray", allow_module_level=True)

DRIVERS, WORKERS = 4, 16
PACE = 4
PATIENCE = 120.0


def unhurried(completions, answer, **kwargs):
    """Most moments find workers at work."""
    time.sleep(0.05)
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def lines(folder: Path) -> int:
    history = folder / HISTORY_FILE
    return history.read_bytes().count(b"\n") if history.exists() else 0


def wait_until(condition, driver: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert os.waitpid(driver, os.WNOHANG) == (0, 0), "the run ended before its last kill"
        assert time.monotonic() < deadline, "the run stands still"
        time.sleep(0.01)


@pytest.mark.slow
def test_kills_of_workers_and_drivers_at_random_moments_do_not_show_in_the_result(make_trainer, one_thread, seed):
    rng = random.Random(seed)
    victims = ["driver"] * DRIVERS + ["worker"] * WORKERS
    rng.shuffle(victims)
    settings = {"strategy": "zo-grpo", "row_budget": 5, "eval_dataset": None, "generations": PACE * len(victims)}
    whole = make_trainer("whole", **settings)
    trainer = make_trainer("killed", **settings, num_workers=2, reward_funcs=unhurried)
    folder = Path(trainer.args.output_dir)

    def start() -> int:
        return in_a_child(trainer, resume=(folder / RUN_FILE).exists())

    whole.train()
    started, driver = time.monotonic(), start()
    try:
        for victim in victims:
            told = lines(folder) + rng.randrange(PACE)
            wait_until(lambda told=told: lines(folder) >= told, driver)
            time.sleep(rng.uniform(0.0, 0.3))
            if victim == "worker":
                wait_until(lambda driver=driver: replicas(driver), driver)
                os.kill(rng.choice(replicas(driver)), signal.SIGKILL)
                continue
            told = lines(folder)
            os.kill(driver, signal.SIGKILL)
            os.waitpid(driver, 0)
            assert not (folder / RUN_FILE).exists() or generations(folder) >= told
            driver = start()
        _, status = os.waitpid(driver, 0)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.kill(driver, signal.SIGKILL)
        raise
    print(f"{DRIVERS} drivers and {WORKERS} workers killed in {time.monotonic() - started:.1f} s")
    assert os.waitstatus_to_exitcode(status) == 0
    assert adapter(folder) == adapter(whole.args.output_dir)
    assert generations(folder) == settings["generations"]
    assert any("catch_up_bytes" in record for record in Run.read(folder).records)
