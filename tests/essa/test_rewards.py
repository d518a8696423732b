from __future__ import annotations

import math
import re

import numpy as np
import pytest
from essa.config import InputError
from essa.data import Prompts
from essa.rewards import Answer, RewardError, Rewards, exact_match, find_reward, math_match

PROMPTS = Prompts(
    "train_dataset",
    [{"prompt": "1+1", "answer": "2", "level": 1}, {"prompt": "2+2", "answer": "4", "level": 2}],
    ["1+1", "2+2"],
    conversational=False,
    columns=["answer", "level"],
)
CHAT = Prompts(
    "train_dataset",
    [{"prompt": [{"role": "user", "content": "1+1"}], "solution": "$2$"}],
    ["<user>1+1"],
    conversational=True,
    columns=["solution"],
)
ANSWERS = [Answer(0, 0, "2", [5]), Answer(0, 1, "5", [6, 7]), Answer(1, 0, " 2\n", []), Answer(1, 1, "4", [8])]


def constant(value):
    def reward(completions, **kwargs):
        return [value] * len(completions)

    return reward


def test_exact_match_ignores_white_space_around():
    assert Rewards("exact_match", None)(PROMPTS, ANSWERS).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert exact_match(["2"], solution=[2]) == [1.0]
    assert exact_match([[{"role": "assistant", "content": "2 "}]], answer=["2"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("The answer is $\\boxed{\\frac{1}{2}}$.", "0.5", 1.0),
        ("so it is 0.5", "\\frac{1}{2}", 1.0),
        ("so it is 0.4", "\\frac{1}{2}", 0.0),
        ("#### 72", "48 + 24 = 72, so\n#### 72", 1.0),
        ("I get $x = 3$", "$3$", 1.0),
        ("no idea", "3", 0.0),
        ("", "3", 0.0),
        ("27", 27, 1.0),
    ],
)
def test_math(completion, reference, reward):
    assert math_match([completion], answer=[reference]) == [reward]


def test_math_names_a_reference_it_cannot_read():
    prompts = Prompts("train_dataset", [{"prompt": "x", "answer": ""}], ["x"], False, ["answer"])
    with pytest.raises(RewardError, match=r"cannot read the reference answer ''.*member 3, prompt 0 of train_dataset"):
        Rewards("math", None)(prompts, [Answer(3, 0, "1", [])])


def test_a_reward_gets_what_trl_gives():
    seen = {}

    def reward(prompts, completions, completion_ids, answer, level, trainer_state, log_extra, log_metric):
        seen.update(locals())
        log_extra("column", answer)
        log_metric("mean_level", np.mean(level))
        return np.arange(len(prompts))

    rewards = Rewards(reward, None)
    rewards.check_columns(PROMPTS)
    values = rewards(PROMPTS, ANSWERS, trainer_state="state")
    assert values.tolist() == [0.0, 1.0, 2.0, 3.0] and values.dtype == np.float64
    assert seen["prompts"] == ["1+1", "2+2"] * 2
    assert seen["completions"] == ["2", "5", " 2\n", "4"]
    assert seen["completion_ids"] == [[5], [6, 7], [], [8]]
    assert seen["answer"] == ["2", "4"] * 2 and seen["level"] == [1, 2] * 2
    assert seen["trainer_state"] == "state"
    assert rewards.metrics == {"mean_level": 1.5}


def test_trls_own_rewards_run_unchanged():
    trl = pytest.importorskip("trl.rewards")
    answers = [Answer(0, 0, "<think>\nx\n</think>\n$\\boxed{2}$", []), Answer(1, 0, "$\\boxed{3}$", [])]
    rewards = Rewards([trl.think_format_reward, trl.accuracy_reward], [0.5, 1.0])
    rewards.check_columns(CHAT)
    assert rewards(CHAT, answers).tolist() == [1.5, 0.0]


def test_rewards_add_up_with_their_weights():
    rewards = Rewards([constant(1.0), "exact_match"], [2.0, 10.0])
    assert rewards(PROMPTS, ANSWERS).tolist() == [12.0, 2.0, 12.0, 12.0]
    with pytest.raises(InputError, match="reward_weights must have 2 numbers, one a function, got 1"):
        Rewards([constant(1.0), "exact_match"], [2.0])


def test_a_reward_that_exits_is_named_but_the_end_of_the_process_is_not_its_own():
    def quits(completions, **kwargs):
        if "5" in completions:
            raise SystemExit(3)
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"quits' raised SystemExit: 3 - on member 0, prompt 1.*completion '5'"):
        Rewards(quits, None)(PROMPTS, ANSWERS)
    with pytest.raises(RewardError, match=r"quits' raised SystemExit: 3 - on member 0, prompt 1.*completion '5'"):
        Rewards(quits, None, timeout=5.0)(PROMPTS, ANSWERS)

    def told_to_end(completions, **kwargs):
        if len(completions) > 1:
            raise SystemExit(15)
        return [0.0]

    with pytest.raises(SystemExit):
        Rewards(told_to_end, None)(PROMPTS, ANSWERS)


def test_rewards_are_what_float32_holds_and_more_is_named():
    tenths = Rewards([constant(0.1), constant(0.2)], None)(PROMPTS, ANSWERS)
    assert tenths.tolist() == [float(np.float32(0.1 + 0.2))] * 4
    for weights, total in (([10.0, 1.0], "inf"), ([1e-260, 1.0], r"1e\+48")):
        with pytest.raises(
            RewardError, match=rf"reward_weights \[.*\] the sum is {total}, .* - for member 0, prompt 0"
        ):
            Rewards([constant(1e308), constant(0.0)], weights)(PROMPTS, ANSWERS)


def test_none_is_no_opinion_but_someone_must_have_one():
    def only_first(completions, **kwargs):
        return [1.0, None, None, None][: len(completions)]

    assert Rewards([only_first, constant(2)], None)(PROMPTS, ANSWERS).tolist() == [3.0, 2.0, 2.0, 2.0]
    with pytest.raises(
        RewardError, match=r"only_first.* returned None for member 0, prompt 1 of train_dataset \('2\+2'\)"
    ):
        Rewards(only_first, None)(PROMPTS, ANSWERS)


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0", [1.0]])
def test_a_value_that_is_no_finite_number_is_named(value):
    def third(completions, **kwargs):
        return [0, 0, value, 0]

    message = re.escape(f"returned {value!r}, must be a finite number - for member 1, prompt 0 of train_dataset")
    with pytest.raises(RewardError, match=f"third.*{message}"):
        Rewards(third, None)(PROMPTS, ANSWERS)


def test_the_wrong_count_is_named():
    def short(completions, **kwargs):
        return [1.0]

    with pytest.raises(RewardError, match=r"short.*returned 1 values for 4 completions.*member 0, prompt 0"):
        Rewards(short, None)(PROMPTS, ANSWERS)


def test_an_exception_is_named_with_its_prompt_and_member():
    def fragile(completions, **kwargs):
        return [1 / (completion != "4") for completion in completions]

    with pytest.raises(
        RewardError, match=r"fragile' raised ZeroDivisionError.*member 1, prompt 1.*completion '4'"
    ) as caught:
        Rewards(fragile, None)(PROMPTS, ANSWERS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_the_whole_batch():
    def fragile(completions, **kwargs):
        return [1.0] if len(completions) == 1 else {}["key"]

    with pytest.raises(RewardError, match="KeyError: 'key' - on a batch of 4 completions"):
        Rewards(fragile, None)(PROMPTS, ANSWERS)


def test_columns_are_checked_before_the_run():
    def needs_column(completions, difficulty, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(InputError, match="needs a column 'difficulty'; train_dataset has 'answer', 'level'"):
        Rewards(needs_column, None).check_columns(PROMPTS)
    no_answer = Prompts("eval_dataset", [{"prompt": "x"}], ["x"], False, [])
    with pytest.raises(InputError, match="'exact_match' needs a column 'answer' or 'solution'; eval_dataset has no"):
        Rewards("exact_match", None).check_columns(no_answer)


def test_names():
    assert find_reward("exact_match") == ("exact_match", exact_match)
    assert find_reward(exact_match) == ("exact_match", exact_match)
    assert find_reward("math")[1] is math_match
    assert find_reward("essa.rewards:exact_match")[1] is exact_match
    assert find_reward(constant(1))[0].endswith("constant.<locals>.reward")


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            "exact_mach",
            "must be one of exact_match, math or path.to.module:function, got 'exact_mach' - did you mean 'exa",
        ),
        ("no.such.module:f", "importing 'no.such.module' failed: ModuleNotFoundError"),
        ("essa.rewards:exact_mtch", "has no 'exact_mtch' - did you mean 'exact_match'"),
        ("essa.rewards:BUILT_IN", "must be a function, got dict"),
        (7, "must be functions or names, got int"),
    ],
)
def test_a_reward_that_cannot_be_found(reward, message):
    with pytest.raises(InputError, match=message):
        find_reward(reward)


def test_models_and_coroutines_are_refused_by_name():
    import torch

    async def later(completions, **kwargs):
        return [0.0]

    with pytest.raises(InputError, match="got Linear; wrap it"):
        find_reward(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="'later' is async"):
        find_reward(later)
    with pytest.raises(InputError, match="at least one"):
        Rewards([], None)
