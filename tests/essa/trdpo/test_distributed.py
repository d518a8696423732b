"""Two processes with half the rows each end where one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "distributed.py"


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_two_processes_end_where_one_does(tmp_path, loss_type):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for processes in (1, 2):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*launch, SCRIPT, tmp_path, loss_type], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (load_file(tmp_path / f"rank{name}.safetensors") for name in ("0of1", "0of2", "1of2"))
    assert loss_type != "kto" or (alone["kl"][2:] > 1e-3).all(), "else KTO's reference point decides nothing"
    for name, expected in alone.items():
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-4, msg=name)
        if name not in ("losses", "kl"):
            assert torch.equal(first[name], second[name]), name
