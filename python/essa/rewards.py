"""Reward functions: the built-in ones, importing others by name, and calling them all safely.

The signature is that of TRL's GRPOTrainer: `reward(prompts=, completions=, completion_ids=, **columns, trainer_state=,
log_extra=, log_metric=) -> list[float]`, one value per completion. For text prompts completions are strings; for
conversational ones each is `[{"role": "assistant", "content": ...}]`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from essa.config import InputError, suggest
from essa.data import Prompts
from essa.imports import import_named

Reward = Callable[..., Sequence[float]]
REFERENCE_COLUMNS = ("answer", "solution")
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class RewardError(InputError):
    """A reward function failed during a run. The run itself is intact and can be resumed."""


def exact_match(
    completions: list, answer: list | None = None, solution: list | None = None, **kwargs: Any
) -> list[float]:
    """1 where the completion equals the column `answer` (or `solution`), surrounding white space aside, else 0."""
    references = _references(answer, solution)
    return [float(_text(c).strip() == str(r).strip()) for c, r in zip(completions, references, strict=True)]


def math_match(
    completions: list, answer: list | None = None, solution: list | None = None, **kwargs: Any
) -> list[float]:
    """1 where math-verify finds the completion's final answer equal to the column `answer` (or `solution`), else 0.

    A reference may be a bare expression, LaTeX, or a worked solution that ends in `#### answer`.
    """
    references = _references(answer, solution)
    return [_math_equal(_text(c), str(r)) for c, r in zip(completions, references, strict=True)]


@functools.lru_cache(maxsize=65536)
def _math_equal(completion: str, reference: str) -> float:
    from math_verify import parse, verify

    gold, seconds = _parse_reference(reference), _time_limit()
    return float(verify(gold, parse(completion, parsing_timeout=seconds), timeout_seconds=seconds))


@functools.lru_cache(maxsize=65536)
def _parse_reference(reference: str) -> list:
    from math_verify import parse

    seconds = _time_limit()
    expression = reference.rpartition("####")[2].strip()
    is_bare = "$" not in expression and "\\boxed" not in expression and "\\(" not in expression
    gold = (is_bare and parse(f"${expression}$", parsing_timeout=seconds)) or parse(expression, parsing_timeout=seconds)
    if not gold:
        raise ValueError(f"math-verify cannot read the reference answer {reference!r}")
    return gold


def _time_limit() -> int | None:
    """Seconds math-verify may take. It keeps time with SIGALRM, which only the main thread may set."""
    return 5 if threading.current_thread() is threading.main_thread() else None


def _references(answer: list | None, solution: list | None) -> list:
    references = solution if answer is None else answer
    if references is None:
        raise ValueError("needs a column 'answer' or 'solution'")
    if None in references:
        raise ValueError("needs an 'answer' or 'solution' in every row, got null")
    return references


def _text(completion: str | list[dict[str, str]]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "math": math_match}


def find_reward(reward: str | Reward) -> tuple[str, Reward]:
    """`(name, function)` of a callable, of a built-in reward, or of `path.to.module:function`."""
    if isinstance(reward, str):
        if reward in BUILT_IN:
            if reward == "math" and importlib.util.find_spec("math_verify") is None:
                raise InputError("reward 'math' needs `pip install math-verify`")
            return reward, BUILT_IN[reward]
        if ":" not in reward:
            raise InputError(
                f"reward must be one of {', '.join(BUILT_IN)} or path.to.module:function, got {reward!r}"
                f"{suggest(reward, BUILT_IN)}"
            )
        return reward, import_named("reward", reward)
    if not callable(reward) or _is_model(reward):
        raise InputError(f"reward_funcs must be functions or names, got {type(reward).__name__}; wrap it in a function")
    if inspect.iscoroutinefunction(reward):
        raise InputError(f"reward {reward.__name__!r} is async; give a plain function")
    for name, function in BUILT_IN.items():
        if reward is function:
            return name, reward
    module, name = getattr(reward, "__module__", ""), getattr(reward, "__qualname__", type(reward).__name__)
    return f"{module}:{name}", reward


def _is_model(reward: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(reward, torch.nn.Module)


@dataclass(frozen=True)
class Answer:
    """One completion to be rewarded: who gave it, to which prompt."""

    member: int
    prompt: int
    text: str
    token_ids: list[int]


class Rewards:
    """The weighted sum of one or more reward functions, with every mistake they can make reported by name.

    A function may return None for a completion it has no opinion on; at least one function must have one.
    """

    def __init__(
        self,
        reward_funcs: str | Reward | Sequence[str | Reward],
        weights: Sequence[float] | None,
        timeout: float | None = None,
    ) -> None:
        """`timeout`: the seconds a function that is not built in may take for one completion."""
        if isinstance(reward_funcs, str) or not isinstance(reward_funcs, Sequence):
            reward_funcs = [reward_funcs]
        if not reward_funcs:
            raise InputError("reward_funcs must name at least one reward function, got none")
        found = [find_reward(reward) for reward in reward_funcs]
        self.names = [name for name, _ in found]
        self._functions = [function for _, function in found]
        self._weights = [1.0] * len(found) if weights is None else list(weights)
        if len(self._weights) != len(found):
            raise InputError(f"reward_weights must have {len(found)} numbers, one a function, got {len(self._weights)}")
        self._timeout = timeout
        self.metrics: dict[str, float] = {}

    def check_columns(self, prompts: Prompts) -> None:
        """Raise `InputError` if a function needs a column that the dataset lacks."""
        have = ", ".join(map(repr, prompts.columns)) or "no further column"
        for name, function in zip(self.names, self._functions, strict=True):
            if function in BUILT_IN.values():
                if not set(REFERENCE_COLUMNS) & set(prompts.columns):
                    raise InputError(
                        f"reward {name!r} needs a column 'answer' or 'solution'; {prompts.name} has {have}"
                    )
                continue
            try:
                parameters = inspect.signature(function).parameters.values()
            except (TypeError, ValueError):
                continue
            for parameter in parameters:
                needed = parameter.default is parameter.empty and parameter.kind in (
                    parameter.POSITIONAL_OR_KEYWORD,
                    parameter.KEYWORD_ONLY,
                )
                if needed and parameter.name not in (*prompts.columns, *TRL_ARGUMENTS):
                    raise InputError(f"reward {name!r} needs a column {parameter.name!r}; {prompts.name} has {have}")

    def __call__(self, prompts: Prompts, answers: list[Answer], trainer_state: Any = None) -> np.ndarray:
        """Rewards of `answers`, float64 [len(answers)], rounded to float32: what crosses a network is then what is told here.

        Raises:
            RewardError: a function raised, returned the wrong number of values or one that is not a finite number, or their
                sum is more than float32 holds.
        """
        self.metrics = {}
        total = np.zeros(len(answers))
        rated = np.zeros(len(answers), dtype=bool)
        for name, function, weight in zip(self.names, self._functions, self._weights, strict=True):
            values = self._rate(name, function, prompts, answers, trainer_state)
            rated |= np.array([value is not None for value in values], dtype=bool)
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is named below
                total += weight * np.array([0.0 if value is None else value for value in values])
        if not rated.all():
            where = _where(prompts, answers[int(np.argmin(rated))])
            raise RewardError(f"reward {', '.join(map(repr, self.names))} returned None for {where}")
        return self._rounded(total, prompts, answers)

    def _rounded(self, total: np.ndarray, prompts: Prompts, answers: list[Answer]) -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = total.astype(np.float32).astype(np.float64)
        if not np.isfinite(rounded).all():
            place = int(np.argmin(np.isfinite(rounded)))
            raise RewardError(
                f"reward {', '.join(map(repr, self.names))}: with reward_weights {self._weights} the sum is {total[place]:g}, "
                f"more than float32 holds - for {_where(prompts, answers[place])}"
            )
        return rounded

    def _rate(
        self, name: str, function: Reward, prompts: Prompts, answers: list[Answer], trainer_state: Any
    ) -> list[float | None]:
        def log_metric(key: str, value: float) -> None:
            self.metrics[key] = float(value)

        def call(batch: list[Answer]) -> list:
            return list(function(**_arguments(prompts, batch), trainer_state=trainer_state, log_metric=log_metric))

        limited = self._timeout is not None and function not in BUILT_IN.values()
        try:
            values = self._one_at_a_time(name, call, prompts, answers) if limited else call(answers)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            culprit = _first_failing(call, answers)
            if culprit is None and isinstance(error, SystemExit):
                raise  # it is not the function that ends this process, but whoever told the process to end
            where = _where(prompts, culprit) if culprit else f"a batch of {len(answers)} completions"
            raise RewardError(f"reward {name!r} raised {type(error).__name__}: {error} - on {where}") from error
        if len(values) != len(answers):
            raise RewardError(
                f"reward {name!r} returned {len(values)} values for {len(answers)} completions, must be one each; "
                f"the batch began with {_where(prompts, answers[0])}"
            )
        return [_finite(name, value, prompts, answer) for value, answer in zip(values, answers, strict=True)]

    def _one_at_a_time(
        self, name: str, call: Callable[[list[Answer]], list], prompts: Prompts, answers: list[Answer]
    ) -> list:
        values: list = []
        assert self._timeout is not None, "no limit, no need"
        for answer in answers:
            try:
                with _time_limit_of(self._timeout):
                    values += call([answer])
            except _TookTooLong:
                raise RewardError(
                    f"reward {name!r} took longer than reward_timeout, {self._timeout:g} s, on {_where(prompts, answer)}"
                ) from None
        return values


@contextlib.contextmanager
def _time_limit_of(seconds: float) -> Iterator[None]:
    """Raises `_TookTooLong` in what runs inside, however it waits. Python delivers signals to the main thread only."""

    def too_long(*_: object) -> None:
        raise _TookTooLong

    if threading.current_thread() is not threading.main_thread():
        raise InputError("reward_timeout needs the search to run in the main thread")
    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _TookTooLong(BaseException):
    """Not an Exception: a reward function that swallows those is to be stopped too."""


def _arguments(prompts: Prompts, answers: list[Answer]) -> dict[str, Any]:
    rows = [prompts.rows[answer.prompt] for answer in answers]
    if prompts.conversational:
        completions: list = [[{"role": "assistant", "content": answer.text}] for answer in answers]
    else:
        completions = [answer.text for answer in answers]
    columns = {column: [row[column] for row in rows] for column in prompts.columns}
    return {
        **columns,
        "prompts": [row["prompt"] for row in rows],
        "completions": completions,
        "completion_ids": [answer.token_ids for answer in answers],
        "log_extra": _ignore,
    }


def _ignore(*args: Any) -> None:
    """TRL's `log_extra` adds columns to a table of completions; there is no such table here."""


def _first_failing(call: Callable[[list[Answer]], list], answers: list[Answer]) -> Answer | None:
    for answer in answers:
        try:
            call([answer])
        except (Exception, SystemExit):  # noqa: BLE001 - whatever it is, this answer causes it
            return answer
    return None


def _finite(name: str, value: Any, prompts: Prompts, answer: Answer) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} returned {value!r}, must be a finite number - for {_where(prompts, answer)}"
        )
    return number


def _where(prompts: Prompts, answer: Answer) -> str:
    prompt = prompts.texts[answer.prompt]
    return (
        f"member {answer.member}, prompt {answer.prompt} of {prompts.name} ({_short(prompt)}), "
        f"completion {_short(answer.text)}"
    )


def _short(text: str, width: int = 120) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")
