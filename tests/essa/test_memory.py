"""What a generation takes does not grow with its population: rows are evaluated chunk by chunk, noise is never stored."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from essa.config import PARAMETRIZATIONS

from benchmarks.methods import peak_of_a_generation


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_a_generation_of_512_members_takes_what_one_of_8_does(make_trainer, parametrization):
    settings = {"parametrization": parametrization, "strategy": "es", "prompts_per_generation": 8, "eval_dataset": None}
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"the peak cannot be reset: {error}")
    peaks = {}
    for members in (8, 8, 512):  # the first warms everything up
        trainer = make_trainer(population_size=members, row_budget=64, **settings)
        before, taken = peak_of_a_generation(trainer)
        peaks[members] = before + taken
    assert peaks[512] <= 1.02 * peaks[8], "the noise of one more full member is 1.2 MB, of 504 it is 620"
