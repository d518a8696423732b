"""`essa demo --trdpo`: its task, and the whole of it in small."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from essa.cli import app
from essa.config import InputError
from essa.trdpo import demo
from typer.testing import CliRunner

pytestmark = pytest.mark.filterwarnings("ignore")
SHOWN = Path(__file__).parents[3] / "benchmarks/results/trdpo_demo.json"


@pytest.fixture(scope="module")
def task():
    return demo.Task(0)


def test_the_gold_reward_by_hand(task):
    prompt, answer = (torch.tensor([task.tokenizer("?27" if p else "013579")["input_ids"]]) for p in (True, False))
    digits = [0, 1, 3, 5, 7, 9]
    expected = sum(task._unigram[2, d] for d in digits)
    expected += sum(task._bigram[a, b] for a, b in itertools.pairwise(digits))
    assert task.gold(prompt, answer).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_start_writes_digits_and_is_no_better_than_itself(task):
    answers, logps = task.sample(task.start, prompts := task.prompts(300))
    assert torch.isin(answers, task.digits).all() and logps.mean() < -12
    torch.testing.assert_close(task.logps(task.start, prompts, answers), logps, rtol=1e-4, atol=1e-4)
    gold, wins, kl = task.measure(task.start)
    assert abs(wins - 0.5) < 0.1 and abs(kl) < 1e-3 and abs(gold) < 2


def test_the_judge_prefers_better_answers_but_errs(task):
    pairs = task.pairs()

    def gold(which):
        ids = [torch.tensor(example.completions[which][:-1]).long() for example in pairs]
        prompts = torch.stack([torch.tensor(example.prompt).long() for example in pairs])
        return task.gold(prompts, torch.stack(ids))

    right = (gold(0) > gold(1)).float().mean().item()
    assert 0.55 < right < 0.92


def test_a_small_demo(tmp_path, monkeypatch, pictures):
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "SYNC_STEPS", 2)
    lines = []
    summary = demo.run_trdpo_demo(tmp_path / "demo", lines.append, betas=(0.1, 1.0), seeds=(0,))
    assert json.loads((tmp_path / "demo/summary.json").read_text()) == summary
    assert [(o["method"], o["beta"]) for o in summary["outcomes"]] == [
        (method, beta) for beta in (0.1, 1.0) for method in demo.METHODS
    ]
    assert all(o["kl"] > -0.05 and 0 < o["win_rate"] < 1 for o in summary["outcomes"])
    told = "\n".join(lines)
    assert all(name in told for name in demo.METHODS) and demo.ADVICE in told
    assert (tmp_path / "demo/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert demo.ADVICE[:40] in (tmp_path / "demo/report.html").read_text()
    with pytest.raises(InputError, match="not empty"):
        demo.run_trdpo_demo(tmp_path / "demo")


def test_the_command(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run_trdpo_demo", lambda *given: asked.append(given[0]))
    assert CliRunner().invoke(app, ["demo", "--trdpo", "--output_dir", str(tmp_path / "d")]).exit_code == 0
    assert asked == [str(tmp_path / "d")]
    result = CliRunner().invoke(app, ["demo", "--trdpo", "--compare", "grpo"])
    assert result.exit_code == 2 and "compare must not be given with trdpo" in result.stderr


def assert_what_the_demo_says(outcomes):
    """Where beta is high a moving reference helps; where it is low it spends more KL for less gold reward."""

    def mean(method, beta, field):
        own = [o[field] for o in outcomes if (o["method"], o["beta"]) == (method, beta)]
        return sum(own) / len(own)

    moving = ("TR-DPO, soft", "TR-DPO, hard")
    for method in moving:
        for beta in (1.0, 2.0):
            assert mean(method, beta, "gold") > mean("DPO", beta, "gold") + 0.3
            assert mean(method, beta, "win_rate") > mean("DPO", beta, "win_rate") + 0.02
        assert all(mean(method, beta, "kl") > 1.2 * mean("DPO", beta, "kl") for beta in demo.BETAS)
        low = [mean(kind, 0.1, "gold") / mean(kind, 0.1, "kl") for kind in (method, "DPO")]
        assert low[0] < 0.75 * low[1]
    assert sum(mean(method, 0.1, "gold") for method in moving) / 2 < mean("DPO", 0.1, "gold") - 0.1


def test_the_numbers_shown_are_what_is_said_of_them():
    outcomes = json.loads(SHOWN.read_text())["outcomes"]
    assert_what_the_demo_says(outcomes)
    for moving in ("TR-DPO, soft", "TR-DPO, hard"):
        for betas in ((0.1,), (1.0, 2.0)):
            swapped = {"DPO": moving, moving: "DPO"}
            other_way = [
                {**o, "method": swapped.get(o["method"], o["method"]) if o["beta"] in betas else o["method"]}
                for o in outcomes
            ]
            with pytest.raises(AssertionError):
                assert_what_the_demo_says(other_way)


@pytest.mark.slow
def test_the_whole_frontier(tmp_path):
    assert_what_the_demo_says(demo.run_trdpo_demo(tmp_path / "demo")["outcomes"])
