"""The READMEs' Python is run as it stands, with the demo's model where it names one of the reader's."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "essa_kernels" / "README.md"]


def blocks() -> Iterator:
    """Each block of Python, under its section's name."""
    for readme in READMES:
        for section in readme.read_text().split("\n## ")[1:]:
            for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
                yield pytest.param(code, id=section.partition("\n")[0])


@pytest.fixture
def stand_ins(tmp_path, monkeypatch, warm_start):
    """What the READMEs' names stand for; the current folder is empty."""
    from essa.demo import task
    from essa.demo.warm_start import BASE_MODEL

    monkeypatch.chdir(tmp_path)
    task.write_jsonl(tmp_path / "train.jsonl", task.rows(task.split("train")[:40]))
    pair = {"prompt": "?26+01=", "chosen": "027", "rejected": "026"}
    task.write_jsonl(tmp_path / "pairs.jsonl", [pair, pair])
    return {
        "Qwen/Qwen2.5-0.5B-Instruct": str(BASE_MODEL),
        "my-warm-start": warm_start,
        'reward_funcs="math"': 'reward_funcs="exact_match"',
        "generations=100": "generations=2, max_new_tokens=4, progress=False",
        "learning_rate=1e-5": "max_steps=1, per_device_train_batch_size=2, report_to='none'",
    }


@pytest.mark.parametrize("block", blocks())
def test_a_block_runs(block, stand_ins, tmp_path):
    for name, stand_in in stand_ins.items():
        block = block.replace(name, stand_in)
    program = tmp_path / "block.py"
    program.write_text(block)
    runpy.run_path(str(program))


def test_pictures_and_files_exist():
    text = (ROOT / "README.md").read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    assert linked
    assert not [path for path in linked if not (ROOT / path).exists()]
