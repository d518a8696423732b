"""The search: what is searched, how, and where it stands.

A `Search` is rebuilt bit for bit, in whichever process, by telling a fresh one the recorded generations in order: their
rewards and, where the strategy asked for them, their scores. Nothing else of it needs storing or sending.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from essa.config import ESSAConfig, InputError
from essa.rollout import owners_of
from essa.strategies import Score, Strategy, make_strategy
from essa_kernels.nn import SVDLoRA


class Search:
    """A parametrisation of a model, a strategy that searches it, and where the two stand.

    Args:
        model: a model that carries the LoRA adapter to search.
        args: the run's settings.

    Attributes:
        space: the parametrisation; its ``attach`` takes what `ask` returns, or a slice of it.
        strategy: the strategy as it stands.
        generation: how many generations it has been told.
        dim: how many coordinates are searched.

    Raises:
        InputError: the model's adapter cannot be searched, or the settings do not fit together.
    """

    def __init__(self, model: torch.nn.Module, args: ESSAConfig) -> None:
        self._args = args
        try:
            self.space = SVDLoRA.from_peft(model, adapter_name(model))
        except (ValueError, TypeError, NotImplementedError) as error:
            raise InputError(f"this LoRA adapter cannot be searched: {error}") from error
        self._searched = self.space.top(args.alpha)
        self.dim = len(self._searched)
        self.reset()

    def reset(self) -> None:
        """Go back to where the search starts."""
        self.strategy = self._new_strategy()
        self.generation = 0
        self._asked: tuple[int, np.ndarray, torch.Tensor] | None = None
        self._taken: torch.Tensor | None = None

    @property
    def temperature(self) -> float:
        """That of the rollouts; 0 is greedy decoding."""
        own = self._args.temperature
        return self.strategy.temperature if own is None else own

    @property
    def solution(self) -> torch.Tensor:
        """What has been found so far, as candidates of one member."""
        return self.values(self.strategy.mean[None]) if self._taken is None else self._taken

    def keep(self) -> torch.Tensor:
        """A copy of the solution, for `take`."""
        return self.solution

    def take(self, kept: torch.Tensor) -> None:
        """Make an earlier solution the solution, once the search is over."""
        self._taken = kept

    def resolved(self) -> dict[str, Any]:
        """The settings whose default is the strategy's own, as they are before the first generation."""
        return {"strategy": self.strategy.name, "sigma": float(self.strategy.sigma), "temperature": self.temperature}

    def ask(self, generation: int) -> torch.Tensor:
        """The candidates of a generation, one a member."""
        return self._ask(generation)[1]

    def rows(self, prompts: int) -> int:
        """How many completions a generation of so many prompts takes."""
        members = self._args.population_size
        return members if self.strategy.assignment == "per_prompt" else members * prompts

    def owners(self, rows: range, prompts: int) -> Iterator[tuple[int, int]]:
        """The member that gives each row of a generation, and the place of the prompt it answers."""
        return owners_of(rows, self.strategy.assignment, self._args.population_size, prompts)

    def digest(self, generation: int) -> str:
        """Identifies the candidates of a generation in a checkpoint."""
        return hashlib.sha256(np.ascontiguousarray(self._ask(generation)[0], dtype="<f4").tobytes()).hexdigest()[:16]

    def tell(self, generation: int, rewards: np.ndarray, score: Score) -> None:
        """Learn from the rewards of the candidates, float64 [members, prompts or 1]."""
        self.strategy.tell(generation, rewards, score)
        self.generation = generation + 1
        self._asked = None

    def replay(self, record: dict[str, Any]) -> bool:
        """Be told a recorded generation. Whether its candidates were this search's own, bit for bit."""
        same = self.digest(record["generation"]) == record["candidates"]
        recorded = iter(record.get("scores", []))
        rewards = np.array(record["rewards"], dtype=np.float64)
        self.tell(record["generation"], rewards, lambda *_: np.array(next(recorded)))
        return same

    def values(self, offsets: np.ndarray) -> torch.Tensor:
        """Candidates at offsets from the start, [members, dim]: singular values, float32 [members, size]."""
        offset = torch.from_numpy(np.ascontiguousarray(offsets, dtype=np.float32))
        start = self.space.spectrum[self._searched]
        searched = start + offset if self._args.offset_mode == "absolute" else start * (1.0 + offset)
        values = self.space.spectrum.repeat(len(offsets), 1)
        values[:, self._searched] = searched
        return values

    def save(self, output_dir: str | Path) -> None:
        """Write the solution as an ordinary PEFT adapter folder."""
        self.space.save_adapter(self.solution[0], output_dir)

    def load_(self) -> None:
        """Make the model itself be the solution."""
        self.space.load_(self.solution[0])

    def _ask(self, generation: int) -> tuple[np.ndarray, torch.Tensor]:
        if self._asked is None or self._asked[0] != generation:
            offsets = self.strategy.ask(generation)
            self._asked = generation, offsets, self.values(offsets)
        return self._asked[1:]

    def _new_strategy(self) -> Strategy:
        args = self._args
        try:
            return make_strategy(
                args.strategy,
                dim=self.dim,
                population_size=args.population_size,
                prompts_per_generation=args.prompts_per_generation,
                seed=args.seed,
                sigma=args.sigma,
                lr=args.learning_rate,
                temperature=args.temperature,
            )
        except ValueError as error:
            raise InputError(str(error)) from error


def adapter_name(model: Any) -> str:
    """The name of a model's one active LoRA adapter."""
    active = model.active_adapters
    active = active() if callable(active) else active
    if len(active) != 1:
        raise InputError(f"exactly one LoRA adapter must be active, got {', '.join(map(repr, active)) or 'none'}")
    return active[0]
