"""Settings of an alignment run: one dataclass, checked when it is made.

The command line and the YAML file take their options, defaults and help from the fields below, so a setting
is described once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class InputError(ValueError):
    """Something the user gave cannot be used. The message says what it was and what would be accepted."""


def suggest(word: str, known: Iterable[str]) -> str:
    """` - did you mean 'x'?` when a known word is close to `word`, else an empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" - did you mean {nearest[0]!r}?" if nearest else ""


def setting(
    default: Any, help: str, *, fixed: bool = False, option: type | None = None, alias: str | None = None
) -> Any:
    """A field with help. `fixed` settings decide the candidates or their rewards, so a resumed run must keep them.
    `option` is the type of the command line's option, where it is not the field's. `alias` is a shorter option name."""
    return field(default=default, metadata={"help": help, "fixed": fixed, "option": option, "alias": alias})


PARAMETRIZATIONS = ("svd", "lora", "lowrank", "full")
OPTIMIZERS = ("sgd", "momentum", "adam")
REWARD_SHAPINGS = ("z-score", "centred-rank", "per-prompt")
PERTURBATIONS = ("member", "completion")
NOISES = ("gaussian", "rademacher")
OFFSET_MODES = ("absolute", "relative")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "int8", "int4")
REPORTERS = ("tensorboard", "wandb")
WITH_COMMAS = ("lora_target_modules", "report_to")
"""Options that take several names with commas between them."""
REPORT_TO = "Also log to tensorboard or wandb (installed separately), or to both, separated by a comma; or none."
CHAT_TEMPLATE_KWARGS = (
    "Further arguments of the chat template, which renders prompts that are messages, as a JSON object: "
    "'{\"enable_thinking\": false}'."
)
DEVICES = "auto (a GPU if there is one), cpu, cuda, cuda:1, or balanced (the layers spread over all GPUs)."
EVALUATED = ("reward", "tokens", "seconds")
"""What an evaluation measures."""


class Checks:
    """Checks of a settings class that name the setting, its value and what is allowed."""

    def _check_path(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (str, os.PathLike)) or not str(value):
            raise InputError(f"{name} must be the path of a folder, got {value!r}")
        setattr(self, name, str(value))

    def _check_int(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least or (most and value > most):
            allowed = f"a whole number of at least {least}" if most is None else f"a whole number in [{least}, {most}]"
            raise InputError(f"{name} must be {allowed}, got {value!r}")

    def _check_float(
        self, name: str, *, above: float | None = None, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        value = getattr(self, name)
        good = _is_finite(value)
        good = good and (above is None or value > above) and (at_least is None or value >= at_least)
        if not good or (at_most is not None and value > at_most):
            lower = f"above {above:g}" if above is not None else f"of at least {at_least:g}"
            upper = "" if at_most is None else f" and at most {at_most:g}"
            raise InputError(f"{name} must be a finite number {lower}{upper}, got {value!r}")
        setattr(self, name, float(value))

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}{suggest(str(value), choices)}")

    def _check_reporters(self) -> None:
        """Take names, one or several separated by commas or as a list, for "none" or a list."""
        given: Any = vars(self)["report_to"]
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
        if names is None or (isinstance(names, list) and names in ([], ["none"])):
            vars(self)["report_to"] = "none"
        elif isinstance(names, list) and set(map(str, names)) <= set(REPORTERS):
            vars(self)["report_to"] = names
        else:
            known = f"none, {', '.join(REPORTERS)}"
            raise InputError(
                f"report_to must be {known} or several of them, got {given!r}{suggest(str(given), REPORTERS)}"
            )


@dataclass
class _Settings(Checks):
    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


@dataclass
class ESSAConfig(_Settings):
    """Settings of `ESSATrainer`. A wrong value raises `InputError` here, before any model is loaded.

    Every field's meaning is in its `metadata["help"]`; `essa align --help` prints them all.
    """

    output_dir: str = field(
        metadata={"help": "Folder of the run: adapter, history, report. Must not hold another run.", "fixed": False}
    )
    population_size: int = setting(
        64,
        "Members of the population. With es-per-completion each answers one prompt: an even number for every prompt.",
        fixed=True,
    )
    prompts_per_generation: int = setting(
        8, "Prompts drawn per generation. With cma every member answers all of them.", fixed=True
    )
    generations: int = setting(100, "Rounds of ask, evaluate, tell. A resumed run may ask for more.")
    sigma: float | None = setting(
        None,
        "Initial step size of the search, in the units of offset_mode. Larger explores more. Default: the strategy's "
        "own.",
        fixed=True,
    )
    alpha: float = setting(
        1.0, "Fraction of each factor's largest singular values that is searched, in (0, 1].", fixed=True
    )
    offset_mode: str = setting(
        "absolute",
        "absolute: value = singular value + offset. relative: value = singular value x (1 + offset).",
        fixed=True,
    )
    parametrization: str = setting(
        "svd",
        "What is searched: svd (a LoRA's singular values), lora (its two factors), lowrank (the weights, perturbed by "
        "low-rank noise: EGGROLL) or full (all weights, one member at a time: ES at Scale). The last two take an adapter "
        "too, merge it into the weights first, and write output_dir/model instead of output_dir/adapter. Or "
        "path.to.module:Class, a parametrization of your own.",
        fixed=True,
    )
    strategy: str | None = setting(
        None,
        "Search strategy: cma, cma-diagonal, es-per-completion, zo-grpo, es or path.to.module:Class, one of your own. svd "
        "takes all, the other parametrizations es. Default: es for those; for svd zo-grpo or, where the population is no multiple of the prompts or the "
        "temperature is 0, the best of the others that fits.",
        fixed=True,
    )
    learning_rate: float | None = setting(
        None, "Step of the ES strategies along their estimated gradient. Default: the strategy's own.", fixed=True
    )
    optimizer: str | None = setting(
        None, "How es steps: sgd (nothing held besides the parameters), momentum or adam. Default: sgd.", fixed=True
    )
    reward_shaping: str | None = setting(
        None,
        "What es makes of rewards: z-score (over the members' means), centred-rank (their ranks) or per-prompt (z-scores "
        "within each prompt). Default: z-score.",
        fixed=True,
    )
    perturbation: str | None = setting(
        None,
        "Whose noise es draws: member (each answers all prompts) or completion (each of population_size completions has "
        "its own). Default: member.",
        fixed=True,
    )
    weight_decay: float | None = setting(
        None, "With es, each step also shrinks what is searched by learning_rate x this. Default: 0.", fixed=True
    )
    noise: str = setting(
        "gaussian", "Distribution of the noise of lora, lowrank and full: gaussian or rademacher (cheaper).", fixed=True
    )
    noise_rank: int = setting(1, "Rank of lowrank's noise.", fixed=True)
    max_new_tokens: int = setting(256, "Longest completion, in tokens.", fixed=True)
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": CHAT_TEMPLATE_KWARGS, "fixed": True, "option": str}
    )
    temperature: float | None = setting(
        None,
        "0 decodes greedily; above 0 completions are sampled. Evaluation is always greedy. Default: the strategy's "
        "own: 1 for zo-grpo, 0 for the others.",
        fixed=True,
    )
    row_budget: int = setting(
        256,
        "Most sequences decoded in one batch. Members are split into chunks of at most this many. auto: the fastest that "
        "fits, measured at the start.",
        fixed=True,
        option=str,
    )
    seed: int = setting(0, "Seed of everything random: same seed, same machine, same adapter.", fixed=True)
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of each reward function in the sum. Default: 1 each.", "fixed": True},
    )
    reward_timeout: float | None = setting(
        None,
        "Seconds a reward function may take for one completion. Then completions are rated one at a time, and the one "
        "that takes longer is named. Default: no limit.",
    )
    eval_steps: int = setting(
        10,
        "Evaluate the mean on the evaluation set every so many generations (and before the first and after the "
        "last). 0: only before and after.",
    )
    load_best_model_at_end: bool = setting(
        False, "Save the mean that was the best in evaluation, by metric_for_best_model, instead of the last one."
    )
    metric_for_best_model: str = setting(
        "reward", "What the best mean is known by: the evaluation's reward, tokens or seconds."
    )
    greater_is_better: bool = setting(True, "Whether more of metric_for_best_model is better.")
    save_steps: int = setting(0, "Refresh output_dir/adapter every so many generations. 0: only at the end.")
    logging_steps: int = setting(1, "Log every so many generations.")
    report_to: str | list[str] = field(
        default="none",
        metadata={
            "help": REPORT_TO,
            "fixed": False,
            "option": str,
        },
    )
    run_name: str | None = setting(None, "Name of the run in wandb and in the report.")
    progress: bool = setting(True, "Show progress on the terminal.")
    dtype: str = setting(
        "auto", "Dtype of a model given by name: auto (as saved), float32, bfloat16 or float16.", fixed=True
    )
    quantization: str = setting(
        "none",
        "Quantise the linear layers of a model given by name: int8, int4 (which computes in bfloat16), or none. The "
        "adapter is not quantised.",
        fixed=True,
    )
    device: str = setting("auto", f"Device of a model given by name: {DEVICES}")
    num_workers: int = setting(
        0,
        "Ray workers that evaluate the population's chunks of row_budget sequences, each on a model of its own. 0: "
        "evaluate in this process.",
        alias="workers",
    )
    ray_address: str | None = setting(
        None,
        "Ray cluster to find workers on: auto or host:port. Default: workers on this machine alone, reachable from it "
        "alone.",
    )
    gpus_per_worker: float | None = setting(
        None,
        "GPUs of a Ray worker: a fraction shares one, 2 and more spread the model's layers over them. Default: 1 where the "
        "cluster has GPUs, else 0.",
    )
    threads_per_worker: int = setting(
        1, "CPU threads of a Ray worker. Keep it: the number of threads may show in a product's last bits."
    )

    def __post_init__(self) -> None:
        self._check_path("output_dir")
        self._check_int("population_size", 2)
        self._check_int("prompts_per_generation", 1)
        self._check_int("generations", 1, 2**32 - 2)
        if self.sigma is not None:
            self._check_float("sigma", above=0.0)
        self._check_float("alpha", above=0.0, at_most=1.0)
        self._check_choice("offset_mode", OFFSET_MODES)
        if ":" not in str(self.parametrization):
            self._check_choice("parametrization", PARAMETRIZATIONS)
        if self.strategy is not None and not isinstance(self.strategy, str):
            raise InputError(f"strategy must be a name, got {self.strategy!r}")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("reward_shaping", REWARD_SHAPINGS),
            ("perturbation", PERTURBATIONS),
        ):
            if getattr(self, name) is not None:
                self._check_choice(name, choices)
        if self.weight_decay is not None:
            self._check_float("weight_decay", at_least=0.0)
        self._check_choice("noise", NOISES)
        self._check_int("noise_rank", 1)
        self._check_of("svd", alpha=1.0, offset_mode="absolute")
        self._check_of("lora", "lowrank", "full", noise="gaussian")
        self._check_of("lowrank", noise_rank=1)
        self._check_of("svd", "lora", quantization="none")
        if self.learning_rate is not None:
            self._check_float("learning_rate", above=0.0)
        self._check_int("max_new_tokens", 1)
        self.chat_template_kwargs = read_chat_template_kwargs(self.chat_template_kwargs)
        if self.temperature is not None:
            self._check_float("temperature", at_least=0.0)
        row_budget: Any = self.row_budget
        if isinstance(row_budget, str) and row_budget.isdecimal():
            self.row_budget = int(row_budget)
        if row_budget != "auto":
            self._check_int("row_budget", 1)
        elif self.num_workers:
            raise InputError("row_budget must be a number with num_workers: auto measures in this process")
        self._check_int("seed", 0, 2**64 - 1)
        if self.reward_weights is not None:
            if not isinstance(self.reward_weights, (list, tuple)) or not all(map(_is_finite, self.reward_weights)):
                raise InputError(f"reward_weights must be a list of finite numbers, got {self.reward_weights!r}")
            self.reward_weights = [float(weight) for weight in self.reward_weights]
        if self.reward_timeout is not None:
            self._check_float("reward_timeout", above=0.0)
        self._check_int("eval_steps", 0)
        self._check_int("save_steps", 0)
        self._check_int("logging_steps", 1)
        self._check_reporters()
        self.metric_for_best_model = str(self.metric_for_best_model).removeprefix("eval_")
        self._check_choice("metric_for_best_model", EVALUATED)
        self._check_choice("dtype", DTYPES)
        self._check_choice("quantization", QUANTIZATIONS)
        self._check_int("num_workers", 0)
        self._check_int("threads_per_worker", 1)
        if self.device == "balanced" and self.num_workers and (self.gpus_per_worker or 1) <= 1:
            raise InputError("device 'balanced' with num_workers needs gpus_per_worker of at least 2: each has its own")
        if self.gpus_per_worker is not None:
            if self.num_workers == 0:
                raise InputError("gpus_per_worker needs num_workers of at least 1")
            self._check_float("gpus_per_worker", at_least=0.0)
            if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
                raise InputError(f"gpus_per_worker above 1 must be a whole number, got {self.gpus_per_worker:g}")
            if self.gpus_per_worker > 1 and self.device not in ("auto", "balanced"):
                raise InputError(
                    f"gpus_per_worker above 1 spreads the model: device must be auto or balanced, got {self.device!r}"
                )
        if self.ray_address is not None:
            if not isinstance(self.ray_address, str) or not self.ray_address:
                raise InputError(f"ray_address must be auto or host:port, got {self.ray_address!r}")
            if self.num_workers == 0:
                raise InputError("ray_address needs num_workers of at least 1")
        for name in ("load_best_model_at_end", "greater_is_better", "progress"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check_of(self, *parametrizations: str, **defaults: Any) -> None:
        """Refuse settings of these parametrisations, other than their defaults, with another one."""
        for name, default in defaults.items():
            value = getattr(self, name)
            if value != default and self.parametrization not in parametrizations:
                raise InputError(
                    f"{name} is a setting of parametrization {' or '.join(parametrizations)}, got {value!r} with "
                    f"{self.parametrization!r}"
                )

    @property
    def eval_strategy(self) -> str:
        """As transformers' callbacks know it: "steps", or "no" where there is no evaluation between first and last."""
        return "steps" if self.eval_steps else "no"

    def fixed(self) -> dict[str, Any]:
        """The settings a resumed run must keep."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["fixed"]}


@dataclass
class SFTConfig(_Settings):
    """Settings of `essa.sft.sft`. A wrong value raises `InputError` here."""

    output_dir: str = field(metadata={"help": "Folder of the new adapter. Must be new or empty."})
    lora_r: int = setting(8, "Rank of the adapter: singular values per factor.")
    lora_alpha: int = setting(16, "LoRA scaling: the adapter counts lora_alpha / lora_r.")
    lora_target_modules: str = setting(
        "all-linear", "Modules to adapt: names separated by commas, or all-linear for every linear layer but the head."
    )
    learning_rate: float = setting(1e-3, "Step size of AdamW.")
    max_steps: int = setting(200, "Batches to train on.")
    batch_size: int = setting(16, "Rows per batch.")
    seed: int = setting(0, "Seed of the adapter's initial weights and of the order of rows.")
    chat_template_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": CHAT_TEMPLATE_KWARGS, "fixed": False, "option": str}
    )

    def __post_init__(self) -> None:
        self._check_path("output_dir")
        self.chat_template_kwargs = read_chat_template_kwargs(self.chat_template_kwargs)
        for name in ("lora_r", "lora_alpha", "max_steps", "batch_size"):
            self._check_int(name, 1)
        if not isinstance(self.lora_target_modules, str) or not self.lora_target_modules:
            raise InputError(f"lora_target_modules must be text, got {self.lora_target_modules!r}")
        self._check_float("learning_rate", above=0.0)
        self._check_int("seed", 0, 2**63 - 1)


def read_chat_template_kwargs(value: Any) -> dict[str, Any] | None:
    """Further arguments of a chat template, which may be given as JSON. Raises `InputError` if JSON has no such object."""
    try:
        read = json.loads(value if isinstance(value, str) else json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InputError(f"chat_template_kwargs must be a JSON object, got {value!r}: {error}") from error
    if read is not None and not isinstance(read, dict):
        raise InputError(f"chat_template_kwargs must be an object of names and values, got {value!r}")
    return read or None


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
