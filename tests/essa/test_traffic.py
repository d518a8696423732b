"""What drivers and workers send each other is little, whatever the rewards, and says exactly what was told; and what becomes
of workers that die or hang, without Ray."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from essa import workers
from essa.checkpoint import Run
from essa.chunks import Chunk, places_of
from essa.messages import pack, unpack
from essa.replica import WorkerError
from essa.rewards import Answer

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray", allow_module_level=True)

LIMIT = 65536
HANGS = object()  # the answer that never comes
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
    """Ray as `Workers` uses it, but its actors are plain objects that answer at once, unless with `HANGS`. An actor that
    answers with an error has died of it."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # for tests after this one: Ray reads it once
    import ray

    serial = itertools.count()

    class Reference:
        def __init__(self, reply):
            self.reply, self.serial = reply, next(serial)

    def method(function):
        return SimpleNamespace(remote=lambda *arguments: Reference(function(*arguments)))

    class Actor:
        def __init__(self, kind, *arguments):
            self.own = kind(*arguments)

        def __getattr__(self, name):
            return method(getattr(self.own, name))

    def remote(kind):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *given: Actor(kind, *given)))

    waits = []

    def wait(references, **_):
        ready = [reference for reference in references if reference.reply is not HANGS]
        ready = sorted(ready, key=lambda reference: reference.serial)[:1]
        waits[:] = [] if ready else [*waits, None]
        assert len(waits) < 100, "nobody works"
        return ready, [reference for reference in references if reference not in ready]

    def get(reference):
        if isinstance(reference.reply, Exception):
            raise reference.reply
        return reference.reply

    nodes = [{"Resources": {"CPU": 64}, "Alive": True}]
    for name, replacement in {
        "remote": remote,
        "wait": wait,
        "get": get,
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


@pytest.fixture
def replies(monkeypatch):
    """Makes a method of replicas answer with what `special` returns, where that is anything."""

    def replace(method, special):
        original = getattr(workers.Replica, method)

        def replaced(replica, *arguments):
            answer = special(replica)
            return original(replica, *arguments) if answer is None else answer

        monkeypatch.setattr(workers.Replica, method, replaced)

    return replace


def test_workers_that_die_while_loading_end_the_run(search_of_96, replies):
    from ray.exceptions import ActorDiedError

    starts = []

    def dies(replica):
        starts.append(replica)
        assert len(starts) < 100, "replaced for ever"
        return ActorDiedError()

    replies("start", dies)
    message = (
        r"5 workers in a row died while loading .* memory for num_workers 3 copies of it\? The last: The actor died"
    )
    with pytest.raises(WorkerError, match=message):
        search_of_96("run", num_workers=3)
    assert len(starts) <= 3 * workers.ATTEMPTS


def test_a_worker_that_loads_its_model_at_last_lets_the_run_go_on(search_of_96, replies):
    from ray.exceptions import ActorDiedError

    _, _, found = search_of_96("alone", **SETTINGS["zo-grpo"])
    fails = (workers.ATTEMPTS - 1) * [True] + [False]
    starts, evaluations = iter(2 * fails), iter([False, True] + 100 * [False])
    replies("start", lambda replica: ActorDiedError() if next(starts) else None)
    replies("evaluate", lambda replica: ActorDiedError() if next(evaluations) else None)
    trainer, _, own = search_of_96("run", **SETTINGS["zo-grpo"], num_workers=1)
    assert own == found and trainer._workers.lost == 2 * sum(fails) + 1 and not list(starts)


@pytest.mark.parametrize(
    "method, good", [("evaluate", 0), ("evaluate", 1), ("evaluate", 3), ("score", 0), ("score", 1)]
)
def test_what_a_worker_that_hangs_had_answered_is_scored_by_another(search_of_96, replies, monkeypatch, method, good):
    """It hangs at its request after `good` ones."""
    _, _, found = search_of_96("alone", **SETTINGS["zo-grpo"])
    monkeypatch.setattr(workers, "LATE_SECONDS", 0.0)
    monkeypatch.setattr(workers, "LATE_TIMES", 0.0)
    asked = []

    def hangs(replica):
        asked.append(replica)
        return HANGS if replica is asked[0] and asked.count(replica) > good else None

    replies(method, hangs)
    _, _, own = search_of_96("run", **SETTINGS["zo-grpo"], num_workers=2)
    assert own == found and asked.count(asked[0]) == good + 1


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
