"""The search: what is searched, how, and where it stands.

A `Search` is rebuilt bit for bit, in whichever process, by telling a fresh one the recorded generations in order: their
rewards and, where the strategy asked for them, their scores. Nothing else of it needs storing or sending.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from essa.config import ESSAConfig, InputError
from essa.imports import import_named
from essa.models import adapter_name, probe
from essa.rollout import batches, owners_of
from essa.strategies import Score, Strategy, make_strategy
from essa_kernels.nn import (
    FullWeights,
    LoRAFactors,
    LowRankNoise,
    Parametrization,
    Perturbed,
    SingularValues,
)

SPACES: dict[str, Callable[..., Parametrization]] = {
    "svd": SingularValues,
    "lora": LoRAFactors,
    "lowrank": LowRankNoise,
    "full": FullWeights,
}
Candidates = torch.Tensor | Perturbed
"""Members as a parametrisation's ``attach`` takes them: offsets [members, dim], or perturbations of its point."""


class Search:
    """A parametrisation of a model, a strategy that searches it, and where the two stand.

    Args:
        model: the model: with a LoRA adapter for "svd" and "lora", without for the other parametrisations.
        args: the run's settings.

    Attributes:
        space: the parametrisation. Its ``attach`` takes what `ask` returns, or a slice of it; its parameters are what
            has been found so far.
        strategy: the strategy as it stands.
        generation: how many generations it has been told.
        dim: how many numbers are searched.

    Raises:
        InputError: the model cannot be searched so, or the settings do not fit together.
    """

    def __init__(self, model: torch.nn.Module, args: ESSAConfig) -> None:
        self._args = args
        self._asked: tuple[int, Candidates] | None = None
        self.space = make_space(model, args)
        self.dim = sum(parameter.numel() for parameter in self.space.parameters)
        self._restart()

    def reset(self) -> None:
        """Go back to where the search starts."""
        self.space.reset()
        self._restart()

    @property
    def temperature(self) -> float:
        """That of the rollouts; 0 is greedy decoding."""
        own = self._args.temperature
        return self.strategy.temperature if own is None else own

    def resolved(self) -> dict[str, Any]:
        """The settings whose default is the strategy's own, as they are before the first generation."""
        return {
            "strategy": self.strategy.name,
            "sigma": float(self.strategy.sigma),
            "temperature": self.temperature,
            **getattr(self.strategy, "settings", {}),
        }

    def ask(self, generation: int) -> Candidates:
        """The candidates of a generation, one a member."""
        if self._asked is None or self._asked[0] != generation:
            asked = self.strategy.ask(generation)
            self._asked = generation, asked if isinstance(asked, Perturbed) else torch.from_numpy(asked)
        return self._asked[1]

    def rows(self, prompts: int) -> int:
        """How many completions a generation of so many prompts takes."""
        members = self._args.population_size
        return members if self.strategy.assignment == "per_prompt" else members * prompts

    def chunks(self, prompts: int) -> list[range]:
        """The rows of a generation of so many prompts, one a completion, cut into what is evaluated at a time: at the row
        budget and, where the parametrisation computes one member at a time, between members. Nothing else decides."""
        return batches(range(self.rows(prompts)), self._args.row_budget, None if self.space.batched else prompts)

    def owners(self, rows: range, prompts: int) -> Iterator[tuple[int, int]]:
        """The member that gives each row of a generation, and the place of the prompt it answers."""
        return owners_of(rows, self.strategy.assignment, self._args.population_size, prompts)

    def starting(self, rows: range, prompts: int) -> list[int]:
        """The members whose first completion is among these rows."""
        before = {member for member, _ in self.owners(range(max(rows.start - 1, 0), rows.start), prompts)}
        return [member for member in dict.fromkeys(m for m, _ in self.owners(rows, prompts)) if member not in before]

    def digest(self, generation: int) -> str:
        """Identifies the candidates of a generation in a checkpoint: the offsets; or key, sigma and a probe of the point."""
        candidates = self.ask(generation)
        if isinstance(candidates, torch.Tensor):
            content = candidates.cpu().numpy().astype("<f4").tobytes()
        else:
            content = repr(candidates).encode() + b"".join(map(probe, self.space.parameters))
        return hashlib.sha256(content).hexdigest()[:16]

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        """Learn from the rewards of the candidates, float64 [members, prompts or 1], or what `condensed` makes of them."""
        self._asked = None
        self.strategy.tell(generation, self.condensed(rewards), score)
        if self.strategy.mean is not None:
            self.space.parameters[0].copy_(torch.from_numpy(self.strategy.mean))
            self.space.moved()
        self.generation = generation + 1

    def condensed(self, rewards: np.ndarray) -> np.ndarray:
        """What the strategy needs of rewards; the same again if given that."""
        condense = getattr(self.strategy, "condense", None)
        return rewards if condense is None else condense(rewards)

    def replay(self, record: dict[str, Any]) -> bool:
        """Be told a recorded generation. Whether its candidates were this search's own, bit for bit."""
        same = self.digest(record["generation"]) == record["candidates"]
        recorded = iter(record.get("scores", []))
        rewards = np.array(record["rewards"], dtype=np.float64)
        self.tell(record["generation"], rewards, lambda *_: np.array(next(recorded)))
        return same

    def asked(
        self, generation: int, rewards: np.ndarray, scores: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """What `tell` would ask its `Score` about `condensed` rewards, the answers to its first questions being known:
        (members, offsets).

        None if it asks no further. The search stays as it is.
        """
        known = iter(scores)

        def score(members: np.ndarray, offsets: np.ndarray) -> np.ndarray:
            answer = next(known, None)
            if answer is None:
                raise _Asked(members, offsets)
            return np.array(answer)

        try:
            copy.deepcopy(self.strategy).tell(generation, rewards, score)
        except _Asked as asked:
            return asked.question
        return None

    def keep(self) -> list[torch.Tensor]:
        """A copy of what has been found so far, for `take`."""
        return [parameter.to("cpu", copy=True) for parameter in self.space.parameters]

    def take(self, kept: list[torch.Tensor]) -> None:
        """Go back to an earlier find, once the search is over."""
        for parameter, earlier in zip(self.space.parameters, kept, strict=True):
            parameter.copy_(earlier)
        self.space.moved()

    def _restart(self) -> None:
        args = self._args
        try:
            self.strategy: Strategy = make_strategy(
                args.strategy,
                dim=self.dim,
                population_size=args.population_size,
                prompts_per_generation=args.prompts_per_generation,
                seed=args.seed,
                sigma=args.sigma,
                lr=args.learning_rate,
                temperature=args.temperature,
                space=self.space,
                optimizer=args.optimizer,
                reward_shaping=args.reward_shaping,
                perturbation=args.perturbation,
                weight_decay=args.weight_decay,
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        self.generation = 0
        self._asked = None


def find_space(name: str) -> Callable[..., Parametrization]:
    """The class of a parametrisation: one of `PARAMETRIZATIONS`, or `path.to.module:Class`.

    Raises:
        InputError: there is none of that name.
    """
    return SPACES[name] if name in SPACES else import_named("parametrization", name, "class")


def of_weights(args: ESSAConfig) -> bool:
    """Whether the parametrisation is one of the model's own weights, and not of its adapter."""
    return getattr(find_space(args.parametrization), "output", "model") != "adapter"


class _Asked(Exception):
    def __init__(self, members: np.ndarray, offsets: np.ndarray) -> None:
        self.question = members, offsets


def make_space(model: torch.nn.Module, args: ESSAConfig) -> Parametrization:
    """The parametrisation that the settings name.

    Raises:
        InputError: it does not fit the model.
    """
    space = find_space(args.parametrization)
    options: dict[str, Any] = {}
    if args.parametrization == "svd":
        options = {"alpha": args.alpha, "offset_mode": args.offset_mode}
    elif args.parametrization in SPACES:
        options = {"distribution": args.noise}
    if args.parametrization == "lowrank":
        options["rank"] = args.noise_rank
    if args.parametrization in ("svd", "lora"):
        options["adapter_name"] = adapter_name(model)
    try:
        return space(model, **options)
    except (ValueError, TypeError, NotImplementedError) as error:
        what = "LoRA adapter" if "adapter_name" in options else "model"
        raise InputError(f"this {what} cannot be searched: {error}") from error
