"""Search strategies: they climb, they replay bit for bit, they refuse what they cannot use."""

from __future__ import annotations

import tracemalloc
import warnings

import cma
import numpy as np
import pytest
import threadpoolctl
from essa.strategies import STRATEGIES, make_strategy
from essa.strategies.cma import CMA
from essa.strategies.shaping import within_prompt
from essa.strategies.zo_grpo import clipped

import essa_kernels
from essa_kernels.noise import STRATEGY_SITE

DIM, PROMPTS = 12, 4
COORDINATES = [name for name in STRATEGIES if name != "es"]
SEARCHERS = [name for name in COORDINATES if name != "zo-grpo"]


def build(name: str, **changes):
    settings = {"dim": DIM, "population_size": 16, "prompts_per_generation": PROMPTS, "sigma": 0.3, "seed": 2**63 + 5}
    return make_strategy(name, **{**settings, **changes})


def answered(strategy, candidates: np.ndarray, reward) -> np.ndarray:
    """Rewards as a rollout would give them: [members, prompts], or [members, 1] when each answers one prompt."""
    rewards = np.array([[reward(candidate, prompt) for prompt in range(PROMPTS)] for candidate in candidates])
    if strategy.assignment == "all":
        return rewards
    prompts = np.repeat(np.arange(PROMPTS), len(candidates) // PROMPTS)
    return rewards[np.arange(len(candidates)), prompts][:, None]


class Bandit:
    """A model of four answers: an offset's log-odds are linear in it. The first answer is right.

    It plays a generation for strategies that sample, where the others are judged by `threshold_reward`.
    """

    def __init__(self, members: int = 16) -> None:
        self.rng = np.random.default_rng(0)
        self.features = self.rng.standard_normal((PROMPTS, 4, DIM))
        self.prompts = np.repeat(np.arange(PROMPTS), members // PROMPTS)
        self.calls: list[np.ndarray] = []

    def probabilities(self, offset: np.ndarray) -> np.ndarray:
        odds = np.exp(self.features @ offset)
        return odds / odds.sum(1, keepdims=True)

    def rewards(self, candidates: np.ndarray) -> np.ndarray:
        drawn = [self.rng.choice(4, p=self.probabilities(c)[p]) for c, p in zip(candidates, self.prompts, strict=True)]
        self.answers = np.array(drawn)
        return (self.answers == 0).astype(float)[:, None]

    def score(self, members: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        assert members.dtype == np.int64 and offsets.dtype == np.float32 and offsets.shape == (len(members), DIM)
        logs = [np.log(self.probabilities(offset)) for offset in offsets]
        rows = zip(logs, self.prompts[members], self.answers[members], strict=True)
        self.calls.append(np.array([log[prompt, answer] for log, prompt, answer in rows]))
        return self.calls[-1]


def no_score(members: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    raise AssertionError("nothing to score")


def threshold_reward(candidate: np.ndarray, prompt: int) -> float:
    """0 or 1: the candidate lies beyond the prompt's hyperplane, on the side of the all-ones direction."""
    return float(candidate.sum() / np.sqrt(len(candidate)) > 0.4 * prompt)


@pytest.mark.parametrize("name", SEARCHERS)
def test_climbs_on_noughts_and_ones(name):
    strategy = build(name)
    for generation in range(60):
        strategy.tell(generation, answered(strategy, strategy.ask(generation), threshold_reward), no_score)
    assert strategy.mean.sum() / np.sqrt(DIM) > 1.2


def test_zo_grpo_learns_to_sample_the_right_answers():
    strategy, bandit = build("zo-grpo", sigma=None), Bandit()
    for generation in range(60):
        strategy.tell(generation, bandit.rewards(strategy.ask(generation)), bandit.score)
    assert bandit.probabilities(strategy.mean)[:, 0].mean() > 0.8


def test_zo_grpo_follows_the_policy_gradient():
    """Over many directions, its first step's estimate is the gradient of sum(advantage x log-probability)."""
    strategy, bandit = build("zo-grpo", sigma=1e-3), Bandit()
    candidates = strategy.ask(0)
    assert not np.ptp(candidates, axis=0).any(), "all members are one point"
    advantages = within_prompt(bandit.rewards(candidates).reshape(PROMPTS, -1)).reshape(-1)
    gradients = []
    strategy._ascent.step = gradients.append
    for generation in range(100):
        strategy.tell(generation, np.where(advantages > 0, 1.0, 0.0)[:, None], bandit.score)
    policy = bandit.probabilities(np.zeros(DIM))[bandit.prompts]
    features = bandit.features[bandit.prompts]
    slopes = features[np.arange(16), bandit.answers] - (policy[:, :, None] * features).sum(1)
    exact = advantages @ slopes / 16
    np.testing.assert_allclose(np.mean(gradients, axis=0), exact, atol=0.1 * np.linalg.norm(exact))


def test_clipping_is_ppos():
    advantages, ratios = np.array([1.0, 1.0, -1.0, -1.0, 2.0]), np.array([1.3, 0.7, 1.3, 0.7, 1.1])
    np.testing.assert_allclose(clipped(advantages, ratios), [0, 0.7, -1.3, 0, 2.2])


def test_zo_grpo_replays_from_rewards_and_scores():
    strategy, bandit, told = build("zo-grpo"), Bandit(), []
    for generation in range(6):
        rewards, bandit.calls = bandit.rewards(strategy.ask(generation)), []
        strategy.tell(generation, rewards, bandit.score)
        told.append((rewards, bandit.calls))
    replayed = build("zo-grpo")
    for generation, (rewards, scores) in enumerate(told):
        recorded = iter(scores)
        replayed.tell(generation, rewards, lambda *_, recorded=recorded: next(recorded))
    assert np.array_equal(replayed.mean, strategy.mean) and replayed.mean.any()


@pytest.mark.parametrize("name", SEARCHERS)
def test_replaying_the_rewards_rebuilds_the_state_bit_for_bit(name):
    strategy, history = build(name), []
    for generation in range(12):
        candidates = strategy.ask(generation)
        assert candidates.shape == (16, DIM) and candidates.dtype == np.float32
        assert np.array_equal(candidates, strategy.ask(generation)), "asking twice changes nothing"
        rewards = answered(strategy, candidates, threshold_reward)
        history.append((candidates, rewards))
        strategy.tell(generation, rewards, no_score)
    replayed = build(name)
    for generation, (candidates, rewards) in enumerate(history):
        if generation % 2:  # a tell needs no ask before it
            assert np.array_equal(replayed.ask(generation), candidates)
        replayed.tell(generation, rewards, no_score)
    assert np.array_equal(replayed.mean, strategy.mean) and replayed.sigma == strategy.sigma
    assert np.array_equal(replayed.ask(12), strategy.ask(12))
    assert not np.array_equal(build(name, seed=6).ask(0), history[0][0])


@pytest.mark.parametrize("name", COORDINATES)
def test_goes_on_when_all_rewards_are_equal(name):
    strategy = build(name)
    for generation in range(30):
        strategy.tell(generation, np.ones((16, PROMPTS if strategy.assignment == "all" else 1)), no_score)
    assert np.isfinite(strategy.ask(30)).all() and np.isfinite(strategy.sigma)


@pytest.mark.parametrize("name", ["cma", "cma-diagonal"])
def test_cma_draws_from_the_noise_contract(name):
    noise = essa_kernels.gaussian((16, DIM), essa_kernels.NoiseKey(2**63 + 5, 0, STRATEGY_SITE))
    np.testing.assert_allclose(build(name).ask(0), 0.3 * noise.numpy(), rtol=1e-4)


@pytest.mark.parametrize("population", [5, 64])  # pycma adapts the step size in two ways
@pytest.mark.parametrize("diagonal", [True, False])
def test_cma_is_pycma_bit_for_bit(diagonal, population):
    ours = CMA(dim=DIM, population_size=population, seed=3, diagonal=diagonal)
    options = {"popsize": population, "CMA_diagonal": diagonal, "CMA_mirrors": 0, "verbose": -9, "seed": float("nan")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = cma.CMAEvolutionStrategy(np.zeros(DIM), 0.3, {**options, "randn": ours._randn})
    for generation in range(40):
        points = plain.ask()
        assert np.array_equal(ours.ask(generation), np.array(points, dtype=np.float32))
        losses = [((point - 1) ** 2).sum() for point in points]
        plain.tell(points, losses)
        ours.tell(generation, -np.array(losses)[:, None], no_score)
        assert np.array_equal(ours.mean, plain.mean) and ours.sigma == plain.sigma


@pytest.mark.parametrize("population", [64, 512])
def test_cma_keeps_its_candidates_once_and_only_until_told(population, dim=512):
    tracemalloc.start()
    try:
        strategy = CMA(dim=dim, population_size=population, seed=3, diagonal=True)
        candidates = 8 * dim * population
        before = tracemalloc.get_traced_memory()[0]
        for generation in range(4):
            asked = strategy.ask(generation)
            taken = tracemalloc.get_traced_memory()[0] - before
            assert taken < asked.nbytes + 1.3 * candidates
            del asked
            strategy.tell(generation, np.random.default_rng(generation).random((population, 1)), no_score)
            assert tracemalloc.get_traced_memory()[0] - before < 0.5 * candidates
    finally:
        tracemalloc.stop()


def test_per_completion_draws_mirrored_pairs():
    candidates = build("es-per-completion").ask(0)
    assert np.array_equal(candidates[0::2], -candidates[1::2])
    noise = essa_kernels.gaussian((8, DIM), essa_kernels.NoiseKey(2**63 + 5, 0, STRATEGY_SITE))
    np.testing.assert_allclose(candidates[0::2], 0.3 * noise.numpy(), rtol=1e-6)


def test_per_completion_ignores_prompts_without_mixed_outcomes():
    mixed = np.array([1, 0, 0, 0], dtype=float)
    steps = []
    for others in (0.0, 1.0):
        strategy = build("es-per-completion")
        rewards = np.full((PROMPTS, 4), others)
        rewards[2] = mixed
        strategy.tell(0, rewards.reshape(-1, 1), no_score)
        steps.append(strategy.mean)
    assert np.array_equal(*steps) and np.abs(steps[0]).max() > 0


def test_within_prompt():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, 1.0, 1.0, 1.0]])
    scores = within_prompt(rewards)
    assert np.array_equal(scores[0], [1, -1, -1, 1]) and not scores[1].any()
    np.testing.assert_allclose(scores[2], np.array([3, -1, -1, -1]) / np.sqrt(3))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cma-diagnoal", {}, "did you mean 'cma-diagonal'"),
        ("cma", {"population_size": 1}, "population_size: got 1, must be at least 2"),
        ("cma", {"population_size": 2}, "population_size: got 2, CMA-ES needs at least 3"),
        ("cma", {"lr": 0.1}, "no learning rate"),
        ("cma", {"sigma": 0.0}, "sigma: got 0.0"),
        ("cma", {"sigma": float("nan")}, "sigma: got nan"),
        ("cma", {"dim": 0}, "dim: got 0"),
        ("es-per-completion", {"prompts_per_generation": 0}, "prompts_per_generation: got 0"),
        ("es-per-completion", {"lr": -1.0}, "lr: got -1.0"),
        ("es-per-completion", {"population_size": 12}, "needs a multiple of 8"),
        ("zo-grpo", {"population_size": 14}, "needs a multiple of the 4 prompts"),
        ("zo-grpo", {"population_size": 4}, "at least two draws"),
        ("zo-grpo", {"temperature": 0}, "temperature must be above 0"),
    ],
)
def test_refuses(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


@pytest.mark.parametrize("name", COORDINATES)
def test_refuses_rewards_that_are_not_the_generations(name):
    strategy = build(name)
    columns = PROMPTS if strategy.assignment == "all" else 1
    with pytest.raises(ValueError, match="generation: got 1, expected 0"):
        strategy.tell(1, np.zeros((16, columns)), no_score)
    with pytest.raises(ValueError, match="shape"):
        strategy.tell(0, np.zeros((15, columns)), no_score)
    with pytest.raises(ValueError, match="got nan for member 3"):
        strategy.tell(0, np.where(np.arange(16)[:, None] == 3, np.nan, np.zeros((16, columns))), no_score)


@pytest.mark.parametrize(
    ("population", "prompts", "temperature", "name"),
    [
        (8, 4, None, "zo-grpo"),
        (12, 4, 0.7, "zo-grpo"),
        (8, 4, 0, "es-per-completion"),
        (12, 4, 0, "cma-diagonal"),
        (24, 64, None, "cma-diagonal"),
        (24, 16, 1.0, "cma-diagonal"),
        (8, 8, None, "cma-diagonal"),
    ],
)
def test_the_default_fits_the_population(population, prompts, temperature, name):
    sizes = {"population_size": population, "prompts_per_generation": prompts, "temperature": temperature}
    assert make_strategy(dim=3, seed=0, **sizes).name == name


def test_threads_of_blas_do_not_show_in_the_search():
    """Workers that replay a search have other numbers of threads than its driver."""
    found = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads, user_api="blas"):
            search = CMA(dim=336, population_size=16, seed=7, diagonal=False)
            for generation in range(12):
                candidates = search.ask(generation)
                search.tell(generation, candidates[:, :4].astype(np.float64), score=None)
            found.append(search.ask(12))
    assert np.array_equal(*found)
