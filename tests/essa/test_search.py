"""The search can be rebuilt from what was recorded, and chunks do not depend on who evaluates them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from essa.checkpoint import Run
from essa.chunks import Local, Task, evaluate_chunk
from essa.config import InputError
from essa.search import Search
from essa.strategies import STRATEGIES


def task_of(trainer, row_budget: int) -> Task:
    args = trainer.args
    return Task(
        trainer.model,
        trainer.processing_class,
        trainer.train_prompts,
        trainer.eval_prompts,
        trainer.rewards,
        args.max_new_tokens,
        args.seed,
        row_budget,
    )


METHODS = [
    *({"strategy": strategy} for strategy in STRATEGIES),
    *({"parametrization": p} for p in ("lora", "lowrank", "full")),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: next(iter(method.values())))
def test_another_process_that_is_told_the_generations_has_the_same_search(make_trainer, method):
    trainer = make_trainer(**method, eval_dataset=None, generations=3)
    trainer.train()
    replica = make_trainer("replica", **method, eval_dataset=None).search
    for record in Run.read(trainer.args.output_dir).records:
        assert replica.generation == record["generation"]
        assert replica.replay(record), "its candidates are the recorded ones"
    assert replica.digest(3) == trainer.search.digest(3)
    for found, wanted in zip(replica.space.parameters, trainer.search.space.parameters, strict=True):
        assert torch.equal(found, wanted)


CONDENSED = [
    {"strategy": "cma"},
    {"strategy": "cma-diagonal"},
    *({"parametrization": "lora", "reward_shaping": shaping} for shaping in ("z-score", "centred-rank", "per-prompt")),
]


@pytest.mark.parametrize("prompts", [1, 7])
@pytest.mark.parametrize("method", CONDENSED, ids=lambda method: "-".join(method.values()))
def test_what_a_strategy_needs_of_rewards_is_a_number_a_member(make_trainer, seed, method, prompts):
    """Told that, it learns the same bits as from the rewards themselves."""
    whole, little = (
        make_trainer(name, **method, prompts_per_generation=prompts).search for name in ("whole", "little")
    )
    rng = np.random.default_rng(seed)
    for generation in range(4):
        rewards = rng.random((16, prompts)).astype(np.float32).astype(np.float64)
        needed = little.condensed(rewards)
        assert needed.shape == (16, 1) and np.array_equal(little.condensed(needed), needed)
        whole.strategy.tell(generation, rewards, None)
        little.strategy.tell(generation, needed, None)
        assert whole.digest(generation + 1) == little.digest(generation + 1)


@pytest.mark.parametrize(
    "method",
    [
        {"strategy": "cma"},
        {"strategy": "zo-grpo"},
        {"parametrization": "lora"},
        {"parametrization": "lowrank", "perturbation": "completion"},
        {"parametrization": "full"},
    ],
    ids=lambda method: next(iter(method.values())),
)
def test_chunks_in_any_order_are_the_whole_generation(make_trainer, method):
    """Rows of several members to a chunk, chunks that end within a member, a last one that is short."""
    trainer = make_trainer(**method)
    chosen, search = [3, 1, 30, 8], trainer.search
    whole = Local(task_of(trainer, 256), search).evaluate(0, chosen)
    rows = search.chunks(len(chosen))[-1].stop
    parts = [range(start, min(start + 7, rows)) for start in range(0, rows, 7)]
    task = task_of(trainer, 7)
    evaluated = {part: evaluate_chunk(task, search, 0, chosen, part) for part in reversed(parts)}
    assert [reward for part in parts for reward in evaluated[part].rewards] == whole.rewards
    assert [answer for part in parts for answer in evaluated[part].answers] == whole.answers
    assert sum(chunk.tokens for chunk in evaluated.values()) == whole.tokens
    for row, answer in enumerate(whole.answers):
        own = search.strategy.assignment == "per_prompt"
        member, place = (row, row // 4) if own else divmod(row, 4)
        assert (answer.member, answer.prompt) == (member, chosen[place])


def test_one_member_at_a_time_means_chunks_of_one_member(make_trainer):
    search = make_trainer(parametrization="full", row_budget=3).search
    assert search.chunks(4)[:3] == [range(3), range(3, 4), range(4, 7)]
    assert make_trainer("lora", parametrization="lora", row_budget=30).search.chunks(4) == [
        range(30),
        range(30, 60),
        range(60, 64),
    ]


def test_what_rewards_log_is_averaged_over_the_rows_of_the_chunks(make_trainer):
    def length(completions, log_metric, **kwargs):
        log_metric("rows", len(completions))
        return [0.0] * len(completions)

    trainer = make_trainer(strategy="zo-grpo", reward_funcs=length, eval_dataset=None, row_budget=10)
    chunk = Local(task_of(trainer, 10), trainer.search).evaluate(0, [0, 1, 2, 3])
    assert len(chunk.rewards) == 16 and chunk.metrics == {"rows": (10 * 10 + 6 * 6) / 16}


def test_an_earlier_solution_can_be_taken_up(make_trainer):
    search = make_trainer(strategy="es-per-completion").search
    kept = search.keep()
    search.tell(0, np.arange(16.0)[:, None], None)
    assert search.space.parameters[0].any()
    search.take(kept)
    assert torch.equal(search.space.parameters[0], kept[0])
    search.tell(1, np.arange(16.0)[:, None], None)
    search.reset()
    assert search.generation == 0 and not search.space.parameters[0].any()


def test_settings_that_do_not_fit_are_refused(make_trainer):
    trainer = make_trainer()
    trainer.args.strategy = "es-per-completion"
    trainer.args.population_size = 6
    with pytest.raises(InputError, match="needs a multiple of 8"):
        Search(trainer.model, trainer.args)
