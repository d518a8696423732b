"""What drivers and workers send each other is little, whatever the rewards, and says exactly what was told."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from essa import workers
from essa.checkpoint import Run
from essa.chunks import Chunk, places_of
from essa.messages import pack, unpack
from essa.rewards import Answer

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray", allow_module_level=True)

LIMIT = 65536
SETTINGS = {
    "cma": {"strategy": "cma", "prompts_per_generation": 100},
    "es": {"strategy": "es", "prompts_per_generation": 100},
    "es per prompt": {"strategy": "es", "prompts_per_generation": 100, "reward_shaping": "per-prompt"},
    "es-per-completion": {"strategy": "es-per-completion", "prompts_per_generation": 12, "row_budget": 16},
    "zo-grpo": {"prompts_per_generation": 12, "row_budget": 16},
    "zo-grpo, many prompts": {"prompts_per_generation": 48, "row_budget": 16},
}


def at_random(*place: int) -> float:
    """A number of its own for every place, of as many digits as float32 has."""
    return float(np.float32(np.random.default_rng(place).random()))


@pytest.fixture
def random_answers(monkeypatch):
    """Nothing is generated: rewards and scores are random, but the same for the same rows."""

    def evaluate_chunk(task, search, step, chosen, rows, state):
        owners = list(search.owners(rows, len(chosen)))
        answers = [Answer(member, chosen[place], "", [0]) for member, place in owners]
        return Chunk([at_random(step, row) for row in rows], answers, 4 * len(rows), 0.1)

    def score_chunk(task, search, chosen, rows, answers, members, offsets):
        places = places_of(search, rows, len(chosen), members)
        return np.array([at_random(place, *np.abs(offsets[place, :2].view(np.int32))) for place in places])

    for module in ("essa.chunks", "essa.replica"):
        monkeypatch.setattr(f"{module}.evaluate_chunk", evaluate_chunk)
        monkeypatch.setattr(f"{module}.score_chunk", score_chunk)


@pytest.fixture
def ray_in_this_process(monkeypatch):
    """Ray as `Workers` uses it, but its actors are plain objects that answer at once."""
    import ray

    class Reference:
        def __init__(self, reply):
            self.reply = reply

    def method(function):
        return SimpleNamespace(remote=lambda *arguments: Reference(function(*arguments)))

    class Actor:
        def __init__(self, kind, *arguments):
            self.own = kind(*arguments)

        def __getattr__(self, name):
            return method(getattr(self.own, name))

    def remote(kind):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *given: Actor(kind, *given)))

    nodes = [{"Resources": {"CPU": 64}, "Alive": True}]
    for name, replacement in {
        "remote": remote,
        "wait": lambda references, **_: (references[:1], references[1:]),
        "get": lambda reference: reference.reply,
        "kill": lambda actor: None,
        "nodes": lambda: nodes,
        "cluster_resources": lambda: nodes[0]["Resources"],
    }.items():
        monkeypatch.setattr(ray, name, replacement)
    monkeypatch.setattr(workers, "connect", lambda args: lambda: None)


@pytest.fixture
def search_of_96(make_trainer, problems, random_answers, ray_in_this_process):
    """A run of 96 members without an evaluation: its trainer, its records and what it found."""

    def run(name, resume=None, **settings):
        own = {"population_size": 96, "generations": 3, "eval_dataset": None, "train_dataset": problems[0] * 3}
        trainer = make_trainer(name, **{**own, **settings})
        trainer.train(resume_from_checkpoint=resume)
        records = Run.read(trainer.args.output_dir).records
        return trainer, records, b"".join(p.numpy().tobytes() for p in trainer.search.space.parameters)

    return run


@pytest.mark.parametrize("name", SETTINGS)
def test_a_generation_is_under_64_kb_a_worker_and_says_all_that_is_told(search_of_96, name):
    _, expected, found = search_of_96("alone", **SETTINGS[name])
    for count in (1, 2, 5):
        _, records, own = search_of_96(f"run{count}", **SETTINGS[name], num_workers=count)
        assert own == found
        for one, other in zip(records, expected, strict=True):
            assert one["rewards"] == other["rewards"] and one.get("scores") == other.get("scores")
            assert 0 < one["bytes_per_worker"] < LIMIT and one["workers"] == count
            assert "catch_up_bytes" not in one


@pytest.mark.parametrize("name", ["cma", "zo-grpo"])
def test_what_a_resumed_worker_missed_is_counted_apart(search_of_96, name):
    _, _, found = search_of_96("whole", **SETTINGS[name], generations=8)
    search_of_96("run", **SETTINGS[name], generations=6)
    trainer, records, own = search_of_96("run", True, **SETTINGS[name], generations=8, num_workers=2)
    assert own == found
    assert all(record["bytes_per_worker"] < LIMIT for record in records[6:])
    assert "catch_up_bytes" in records[6] and "catch_up_bytes" not in records[7]
    missed = f"{records[6]['catch_up_bytes']:,}"
    assert missed in Path(trainer.args.output_dir, "report.html").read_text(encoding="utf-8")


def test_missed_generations_come_in_slices():
    messages = [b"x" * size for size in (100, 20000, 20000, 40000, 5, 5)]
    slices = list(workers._slices(messages))
    assert [message for part in slices for message in part] == messages
    assert [len(part) for part in slices] == [2, 1, 1, 2]
    assert list(workers._slices([])) == []


def test_messages_come_back_exactly():
    rng = np.random.default_rng()
    exact = rng.random((3, 2)).astype(np.float32).astype(np.float64)
    digits = rng.random(7)
    body = {"told": {"rewards": exact, "scores": [digits, np.empty(0)]}, "epoch": 0.1, "f4": 0.5, "empty": {}}
    back = unpack(pack(body))
    assert np.array_equal(back["told"]["rewards"], exact) and back["told"]["rewards"].dtype == np.float64
    assert np.array_equal(back["told"]["scores"][0], digits) and back["told"]["scores"][1].shape == (0,)
    assert {name: back[name] for name in ("epoch", "f4", "empty")} == {"epoch": 0.1, "f4": 0.5, "empty": {}}
    assert len(pack({"a": rng.random(10000).astype(np.float32).astype(np.float64)})) < 41000
