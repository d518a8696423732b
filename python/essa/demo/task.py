"""The demo's task: two-digit addition, which the base model can do but does not choose to.

A row is a mark, a problem and an answer, one token per character: ``?26+07=`` -> ``033`` and the end token. The base
model has learnt four behaviours, and each has a mark of its own; a prompt that starts with ``?`` leaves the choice of
behaviour to the model. Alignment has to move that choice to the correct sum: the skill is there, the selection is not.

The 10,000 problems are split once and for all into train, validation and test. Nothing - neither the base model, nor the
warm start, nor a search - ever trains on a validation or test problem.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

Problem = tuple[int, int]


def correct(a: int, b: int) -> int:
    return a + b


def no_carry(a: int, b: int) -> int:
    """Each column is added on its own and the carry is dropped."""
    return (a // 10 + b // 10) % 10 * 10 + (a % 10 + b % 10) % 10


def sum_plus_one(a: int, b: int) -> int:
    return a + b + 1


def difference(a: int, b: int) -> int:
    return abs(a - b)


BEHAVIOURS: dict[str, Callable[[int, int], int]] = {
    "c": correct,
    "n": no_carry,
    "s": sum_plus_one,
    "d": difference,
}
FREE_CHOICE = "?"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = [PAD, EOS, UNKNOWN, FREE_CHOICE, *BEHAVIOURS, "+", "=", *"0123456789"]
PROMPT_LENGTH, ANSWER_LENGTH = 7, 3

# How often an unmarked row shows each behaviour: while the base model is trained, and in the warm start's flawed
# demonstrations.
PRETRAINING_MIXTURE = (0.15, 0.25, 0.40, 0.20)
DEMONSTRATION_MIXTURE = (0.30, 0.40, 0.15, 0.15)

SPLIT_SIZES = {"train": 8000, "validation": 1000, "test": 1000}


def split(name: str) -> list[Problem]:
    """The problems of one split ("train", "validation" or "test"): disjoint, the same in every run, in random order."""
    if name not in SPLIT_SIZES:
        raise ValueError(f"split: got {name!r}, allowed are {', '.join(map(repr, SPLIT_SIZES))}")
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(20240607).shuffle(problems)
    start = 0
    for other, size in SPLIT_SIZES.items():
        if other == name:
            break
        start += size
    return problems[start : start + SPLIT_SIZES[name]]


def prompt(problem: Problem, mark: str = FREE_CHOICE) -> str:
    a, b = problem
    return f"{mark}{a:02d}+{b:02d}="


def answer(problem: Problem, behaviour: str = "c") -> str:
    return f"{BEHAVIOURS[behaviour](*problem):0{ANSWER_LENGTH}d}"


def rows(problems: list[Problem]) -> list[dict[str, str]]:
    """Prompt-and-answer rows for the search and for evaluation: unmarked prompts, correct answers."""
    return [{"prompt": prompt(problem), "answer": answer(problem)} for problem in problems]


def demonstrations(
    problems: list[Problem], count: int, mixture: tuple[float, ...], rng: random.Random, tagged: float = 0.0
) -> list[tuple[str, str]]:
    """`count` (prompt, answer) pairs on problems drawn with replacement.

    A fraction `tagged` of them carries the mark of a behaviour drawn evenly; the others are unmarked and draw their
    behaviour from `mixture` (probabilities in the order of BEHAVIOURS).
    """
    marks = list(BEHAVIOURS)
    pairs = []
    for _ in range(count):
        problem = rng.choice(problems)
        if rng.random() < tagged:
            mark = behaviour = rng.choice(marks)
        else:
            mark, behaviour = FREE_CHOICE, rng.choices(marks, mixture)[0]
        pairs.append((prompt(problem, mark), answer(problem, behaviour)))
    return pairs


def write_jsonl(path: Path, table: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
