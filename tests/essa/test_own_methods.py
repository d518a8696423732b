"""The worked examples of strategies/README.md, run as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import essa.strategies
import pytest
import torch
from essa.checkpoint import Run
from essa.config import InputError
from safetensors.torch import load_file

README = Path(essa.strategies.__file__).with_name("README.md")
SETTINGS = {
    "CrossEntropy": {"strategy": "my_methods:CrossEntropy", "population_size": 16},
    "Steering": {"parametrization": "my_methods:Steering", "sigma": 0.5, "learning_rate": 0.3},
}


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """The examples' code, importable as `my_methods`."""
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (tmp_path / "my_methods.py").write_text("\n\n".join(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield code
    sys.modules.pop("my_methods", None)


def test_each_is_a_small_file(blocks):
    assert len(blocks) == 2
    assert all(len(code.splitlines()) <= 50 for code in blocks)


@pytest.mark.parametrize("example", SETTINGS)
def test_it_learns_and_resumes_bit_for_bit(make_trainer, blocks, example):
    settings = {"prompts_per_generation": 16, "generations": 20, **SETTINGS[example]}
    trainer = make_trainer(**settings)
    summary = trainer.train()
    assert summary["eval_reward"] >= summary["eval_reward_before"] + 0.15
    assert trainer.evaluate()["eval_reward"] == summary["eval_reward"]
    make_trainer("stopped", **{**settings, "generations": 3}).train()
    resumed = make_trainer("stopped", **{**settings, "generations": 20})
    resumed.train(resume_from_checkpoint=True)
    for found, wanted in zip(resumed.search.space.parameters, trainer.search.space.parameters, strict=True):
        assert torch.equal(found, wanted)
    name = "strategy" if example == "CrossEntropy" else "parametrization"
    assert Run.read(trainer.args.output_dir).identity["settings"][name] in (SETTINGS[example][name], "cross-entropy")
    if example == "Steering":
        saved = load_file(Path(trainer.args.output_dir, "steering", "steering.safetensors"))
        assert torch.equal(saved["vector"], trainer.search.space.parameters[0])


def test_what_cannot_be_imported_or_combined_is_named(make_trainer, blocks):
    with pytest.raises(
        InputError, match=r"strategy 'my_methods:CrossEntropi': 'my_methods' has no 'CrossEntropi' - did you"
    ):
        make_trainer(strategy="my_methods:CrossEntropi")
    with pytest.raises(InputError, match=r"parametrization 'no_such:Space': importing 'no_such' failed"):
        make_trainer(parametrization="no_such:Space")
    with pytest.raises(
        InputError, match=r"'my_methods:CrossEntropy', which searches a list of coordinates; .* 'lora' has"
    ):
        make_trainer(strategy="my_methods:CrossEntropy", parametrization="lora")
