"""The demo: its task and splits, its base model, and the whole run in small."""

from __future__ import annotations

import json
import random

import pytest
import torch
from essa.config import InputError
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL
from safetensors.torch import load_file


def test_the_splits_are_disjoint_and_cover_all_problems():
    splits = {name: task.split(name) for name in task.SPLIT_SIZES}
    assert {name: len(problems) for name, problems in splits.items()} == task.SPLIT_SIZES
    assert len(set().union(*splits.values())) == 10_000
    assert splits == {name: task.split(name) for name in task.SPLIT_SIZES}
    with pytest.raises(ValueError, match="'tests'"):
        task.split("tests")


@pytest.mark.parametrize(
    ("problem", "answers"), [((26, 7), "033 023 034 019"), ((99, 99), "198 088 199 000"), ((0, 50), "050 050 051 050")]
)
def test_behaviours(problem, answers):
    assert [task.answer(problem, behaviour) for behaviour in task.BEHAVIOURS] == answers.split()


def test_rows_and_demonstrations():
    assert task.rows([(26, 7)]) == [{"prompt": "?26+07=", "answer": "033"}]
    pairs = task.demonstrations([(26, 7)], 2000, (0.3, 0.4, 0.15, 0.15), random.Random(0), tagged=0.5)
    marked = [pair for pair in pairs if pair[0][0] != task.FREE_CHOICE]
    assert len(marked) == pytest.approx(1000, abs=100)
    assert all(text == task.answer((26, 7), prompt[0]) for prompt, text in marked)
    unmarked = [text for prompt, text in pairs if prompt[0] == task.FREE_CHOICE]
    assert unmarked.count("023") / len(unmarked) == pytest.approx(0.4, abs=0.06)


@pytest.fixture(scope="module")
def base():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BASE_MODEL, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(BASE_MODEL)


def test_the_tokenizer_has_one_token_per_character(base):
    _, tokenizer = base
    ids = tokenizer("?26+07=")["input_ids"]
    assert [task.VOCABULARY[i] for i in ids] == list("?26+07=")
    answer = [task.VOCABULARY.index(token) for token in ("0", "3", "3", task.EOS, task.PAD)]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "033"
    assert tokenizer.eos_token == task.EOS and tokenizer.pad_token == task.PAD


def test_the_base_model_has_the_skill_but_not_the_choice(base):
    from essa.demo.make_base_model import accuracy

    model, tokenizer = base
    assert sum(parameter.numel() for parameter in model.parameters()) == 307_296
    assert accuracy(model, tokenizer, "c", "c") > 0.95
    assert accuracy(model, tokenizer, task.FREE_CHOICE, "c") < 0.5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_small_demo_run(tmp_path):
    from essa.demo.run import CONTROL_SCALES, run_demo

    lines = []
    summary = run_demo(tmp_path / "demo", seed=3, say=lines.append, generations=4, eval_steps=2, progress=False)
    assert json.loads((tmp_path / "demo/summary.json").read_text()) == summary
    for name in ("accuracy_before", "accuracy_after", "accuracy_control"):
        assert 0 < summary[name] < 1
    assert summary["control_scale"] in CONTROL_SCALES
    assert summary["seed"] == 3 and summary["samples"] > 0 and summary["seconds"] > 0
    assert any("uniform scale" in line for line in lines), "the control stands beside the result"
    for name in ("base_model", "warm_start", "adapter"):
        assert (tmp_path / summary[name] / "config.json").exists() or load_file(
            f"{summary[name]}/adapter_model.safetensors"
        )
    for split, size in task.SPLIT_SIZES.items():
        with open(summary[f"{split}_file"], encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        assert rows == task.rows(task.split(split)) and len(rows) == size
    page = (tmp_path / "demo/essa/report.html").read_text()
    assert "best uniform scale (control)" in page and "best uniform scale of it" in page

    with pytest.raises(InputError, match="not empty"):
        run_demo(tmp_path / "demo")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_demo_of_another_parametrisation(tmp_path, monkeypatch):
    from essa.demo import run

    monkeypatch.setattr(run, "CONTROL_SCALES", (1.0,))
    lines = []
    folder, search = tmp_path / "demo", {"generations": 2, "eval_steps": 0, "progress": False}
    summary = run.run_demo(folder, parametrization="lowrank", say=lines.append, **search)
    assert load_file(f"{summary['model']}/model.safetensors") and "adapter" not in summary
    assert "Search: 304,128 weights ..." in lines and any(line.startswith("model:   ") for line in lines)
    assert summary["accuracy_control"] == pytest.approx(summary["accuracy_before"], abs=0.01), "the merged warm start"
    with pytest.raises(InputError, match="parametrization must be one of svd, lora, lowrank, full, got 'dora'"):
        run.run_demo(tmp_path / "other", parametrization="dora")


def test_bad_input_leaves_nothing_behind(tmp_path):
    from essa.demo.run import run_demo

    with pytest.raises(InputError, match="compare must be 'grpo'"):
        run_demo(tmp_path / "demo", compare="ppo")
    with pytest.raises(InputError, match="population_size"):
        run_demo(tmp_path / "demo", population_size=1)
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_whole_demo_with_grpo(tmp_path):
    pytest.importorskip("trl")
    from essa.demo.run import run_demo

    summary = run_demo(tmp_path / "demo", compare="grpo", progress=False)
    assert summary["accuracy_before"] < 0.5 and summary["accuracy_control"] < 0.5
    assert summary["accuracy_after"] > 0.85 and summary["grpo"]["accuracy_after"] > 0.7
    assert "GRPO" in (tmp_path / "demo/essa/report.html").read_text()
