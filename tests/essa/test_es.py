"""The strategy `es`: its steps are the estimate's, its shapings and optimisers what they say, its refusals by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from essa.config import OPTIMIZERS as OPTIMIZER_NAMES
from essa.config import PARAMETRIZATIONS, REWARD_SHAPINGS
from essa.strategies import make_strategy
from essa.strategies.es import DEFAULTS
from essa.strategies.optimizers import OPTIMIZERS, sqrt_
from essa.strategies.shaping import SHAPINGS, centred_rank, per_prompt, z_score

from essa_kernels import es_update_, gaussian

DIM, PROMPTS, SEED = 12, 4, 2**63 + 5


class Vector:
    """The smallest parametrisation: one vector, no model."""

    name, batched, output = "vector", True, "model"

    def __init__(self, start: float = 0.0) -> None:
        self.parameters = [torch.full((DIM,), start)]
        self.moves = 0

    def add_noise_(self, tensors, key, weights):
        es_update_(tensors, key, weights)

    def moved(self):
        self.moves += 1


def build(space=None, **changes):
    space = space or Vector()
    settings = {"population_size": 16, "prompts_per_generation": PROMPTS, "seed": SEED, "sigma": 0.3, "lr": 0.2}
    return make_strategy("es", dim=DIM, space=space, **{**settings, **changes}), space


def noise(asked) -> np.ndarray:
    return np.stack([gaussian(DIM, asked.key, member).numpy() for member in asked.members]).astype(np.float64)


def answered(strategy, space, generation: int) -> np.ndarray:
    """0 or 1: the member lies beyond the prompt's hyperplane, on the side of the all-ones direction."""
    asked = strategy.ask(generation)
    members = space.parameters[0].numpy() + asked.sigma * noise(asked)
    height = members.sum(1) / np.sqrt(DIM)
    if strategy.assignment == "all":
        return (height[:, None] > 0.4 * np.arange(PROMPTS)).astype(float)
    return (height > 0.4 * np.repeat(np.arange(PROMPTS), len(height) // PROMPTS)).astype(float)[:, None]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("shaping", "perturbation"), [("z-score", "member"), ("centred-rank", "member"), ("per-prompt", "completion")]
)
def test_climbs_on_noughts_and_ones_and_replays_bit_for_bit(optimizer, shaping, perturbation):
    choice = {"optimizer": optimizer, "reward_shaping": shaping, "perturbation": perturbation}
    strategy, space = build(**choice)
    told = []
    for generation in range(60):
        told.append(answered(strategy, space, generation))
        strategy.tell(generation, told[-1], None)
    assert space.parameters[0].sum() / np.sqrt(DIM) > 1.2
    replayed, other = build(**choice)
    for generation, rewards in enumerate(told):
        replayed.tell(generation, rewards, None)
    assert torch.equal(other.parameters[0], space.parameters[0])


def test_a_plain_step_is_the_estimate():
    strategy, space = build(lr=0.7, sigma=0.4, weight_decay=0.5, space=Vector(start=2.0))
    rewards = np.random.default_rng(0).random((16, PROMPTS))
    asked = strategy.ask(0)
    assert asked.sigma == 0.4 and asked.members == range(16)
    strategy.tell(0, rewards, None)
    fitness = rewards.mean(1)
    weights = (fitness - fitness.mean()) / fitness.std()
    expected = 2.0 * (1 - 0.7 * 0.5) + 0.7 * weights @ noise(asked) / (16 * 0.4)
    np.testing.assert_allclose(space.parameters[0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert strategy.ask(1).key.generation == 1 and space.moves == 1


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_optimisers_are_torchs(optimizer):
    strategy, space = build(optimizer=optimizer, lr=0.05)
    rng, steps = np.random.default_rng(1), []
    parameter = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    if optimizer == "adam":
        torchs = torch.optim.Adam([parameter], lr=0.05, maximize=True)
    else:
        torchs = torch.optim.SGD([parameter], lr=0.05 * 0.1, momentum=0.9, maximize=True)
    for generation in range(5):
        rewards = rng.random((16, PROMPTS))
        fitness = rewards.mean(1)
        weights = (fitness - fitness.mean()) / fitness.std()
        parameter.grad = torch.from_numpy(weights @ noise(strategy.ask(generation)) / (16 * 0.3))
        strategy.tell(generation, rewards, None)
        torchs.step()
        steps.append(parameter.detach().clone())
    torch.testing.assert_close(space.parameters[0].double(), steps[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_optimisers_round_one_operation_at_a_time(optimizer):
    """As any device rounds alike: numpy's float32 arithmetic, which fuses nothing, takes the same steps to the bit."""
    strategy, space = build(optimizer=optimizer, lr=0.05, weight_decay=0.3)
    total, squares, point = np.zeros((3, DIM), np.float32)
    for generation in range(4):
        rewards = np.random.default_rng(generation).random((16, PROMPTS))
        fitness = rewards.mean(1)
        weights = (fitness - fitness.mean()) / fitness.std() / (16 * 0.3)
        point = point * np.float32(1 - 0.05 * 0.3)
        if optimizer == "momentum":
            total = total * np.float32(0.9)
            space.add_noise_(
                [torch.from_numpy(total)], strategy.ask(generation).key, (0.05 * (1 - 0.9) * weights).tolist()
            )
            point = point + total
        else:
            gradient = np.zeros(DIM, np.float32)
            space.add_noise_([torch.from_numpy(gradient)], strategy.ask(generation).key, weights.tolist())
            total = total * np.float32(0.9) + gradient
            squares = squares * np.float32(0.999) + gradient * gradient
            spread = (1 - 0.999) / (1 - 0.999 ** (generation + 1))
            pace = 0.05 * (1 - 0.9) / (1 - 0.9 ** (generation + 1))
            divisor = np.sqrt(squares * np.float32(spread)) + np.float32(1e-8)
            point = point + total / divisor * np.float32(pace)
        strategy.tell(generation, rewards, None)
        assert np.array_equal(space.parameters[0].numpy(), point)


def test_square_roots_are_correctly_rounded():
    numbers = torch.rand(2**20 + 77) * 10.0 ** torch.randint(-30, 30, (2**20 + 77,))
    expected = np.sqrt(numbers.double().numpy()).astype(np.float32)
    assert np.array_equal(sqrt_(numbers).numpy(), expected)


def test_shapings():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [3.0, 1.0, 1.0, 1.0]])
    means = rewards.mean(0)
    np.testing.assert_allclose(z_score(rewards, True), (means - means.mean()) / means.std())
    np.testing.assert_allclose(centred_rank(rewards, True), [0.5, -1 / 3, -1 / 3, 1 / 6])
    own = per_prompt(rewards, False)
    np.testing.assert_allclose(own[:8], [1, -1, -1, 1, 0, 0, 0, 0])
    scores = np.array([[1, -1, -1, 1], [0, 0, 0, 0], np.array([3, -1, -1, -1]) / np.sqrt(3)]).mean(0)
    np.testing.assert_allclose(per_prompt(rewards, True), (scores - scores.mean()) / scores.std())
    assert centred_rank(rewards, False).sum() == pytest.approx(0) and len(centred_rank(rewards, False)) == 12
    for shape in SHAPINGS.values():
        for shared in (True, False):
            assert not shape(np.ones((3, 4)), shared).any(), "nobody did better than anybody"


def test_nothing_moves_when_all_rewards_are_equal():
    strategy, space = build(weight_decay=0.1, space=Vector(start=1.0))
    strategy.tell(0, np.ones((16, PROMPTS)), None)
    assert torch.equal(space.parameters[0], torch.ones(DIM)) and not space.moves


def test_the_names_of_the_settings_are_all_there():
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES and tuple(SHAPINGS) == REWARD_SHAPINGS
    assert tuple(DEFAULTS) == PARAMETRIZATIONS
    assert all(set(rates) == set(OPTIMIZERS) for _, rates in DEFAULTS.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"population_size": 15},
            "population_size: got 15, strategy 'es' needs a multiple of 2 .members come in mirrored",
        ),
        (
            {"population_size": 12, "perturbation": "completion"},
            "needs a multiple of 8 .an even number of draws for each",
        ),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"sigma": -1.0}, "sigma: got -1.0"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_refuses_what_belongs_to_others():
    settings = {"dim": DIM, "population_size": 16, "prompts_per_generation": PROMPTS, "seed": 0}
    with pytest.raises(ValueError, match="space: strategy 'es' needs the parametrisation"):
        make_strategy("es", **settings)
    with pytest.raises(ValueError, match="optimizer: got 'adam', but only strategy 'es' has it, not 'cma'"):
        make_strategy("cma", optimizer="adam", **settings)
    with pytest.raises(
        ValueError, match="got 'cma', which searches a list of coordinates; parametrization 'vector' has 12"
    ):
        make_strategy("cma", space=Vector(), **settings)
    one_at_a_time = Vector()
    one_at_a_time.batched = False
    with pytest.raises(ValueError, match="perturbation: got 'completion', but parametrization 'vector' computes one"):
        build(one_at_a_time, perturbation="completion")
    strategy, _ = build()
    with pytest.raises(ValueError, match="generation: got 1, expected 0"):
        strategy.tell(1, np.zeros((16, PROMPTS)), None)
    with pytest.raises(ValueError, match="shape"):
        strategy.tell(0, np.zeros((15, PROMPTS)), None)
