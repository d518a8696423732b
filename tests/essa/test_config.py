from __future__ import annotations

import dataclasses
import datetime
import math

import pytest
from essa.config import ESSAConfig, InputError, SFTConfig, suggest
from essa.trdpo.settings import CommandSettings


def test_defaults_are_valid():
    config = ESSAConfig(output_dir="run")
    assert config.to_dict()["population_size"] == config.population_size


@pytest.mark.parametrize("kind", [ESSAConfig, SFTConfig])
def test_every_field_explains_itself(kind):
    for field in dataclasses.fields(kind):
        assert len(field.metadata["help"]) > 10, field.name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_dir", ""),
        ("output_dir", 3),
        ("population_size", 1),
        ("population_size", 2.0),
        ("population_size", True),
        ("prompts_per_generation", 0),
        ("generations", 0),
        ("generations", 2**32),
        ("sigma", 0.0),
        ("sigma", -1.0),
        ("sigma", math.nan),
        ("sigma", math.inf),
        ("sigma", "0.2"),
        ("alpha", 0.0),
        ("alpha", 1.5),
        ("offset_mode", "relativ"),
        ("strategy", 3),
        ("parametrization", "svdd"),
        ("optimizer", "sdg"),
        ("reward_shaping", "rank"),
        ("perturbation", "row"),
        ("weight_decay", -1.0),
        ("noise", "uniform"),
        ("noise_rank", 0),
        ("learning_rate", 0.0),
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("row_budget", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("reward_weights", "1"),
        ("reward_weights", [1.0, math.nan]),
        ("eval_steps", -1),
        ("save_steps", -1),
        ("logging_steps", 0),
        ("report_to", "mlflow"),
        ("report_to", ["wandb", "none"]),
        ("report_to", "wandb,none"),
        ("report_to", [3]),
        ("metric_for_best_model", "loss"),
        ("greater_is_better", "yes"),
        ("chat_template_kwargs", "{enable_thinking"),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", {"date_string": datetime.date(2026, 1, 1)}),
        ("dtype", "float64"),
        ("progress", "yes"),
    ],
)
def test_a_wrong_value_is_named(name, value):
    with pytest.raises(InputError) as caught:
        ESSAConfig(**{"output_dir": "run", name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("nothing", [None, ["none"], "none"])
def test_nothing_to_report_to(nothing):
    assert ESSAConfig("run", report_to=nothing).report_to == "none"


def test_several_to_report_to():
    for given in ("tensorboard, wandb", ["tensorboard", "wandb"]):
        assert ESSAConfig("run", report_to=given).report_to == ["tensorboard", "wandb"]
    settings = CommandSettings(report_to="wandb")
    settings.check()
    assert settings.report_to == ["wandb"]


def test_arguments_of_the_chat_template_may_be_json():
    config = ESSAConfig("run", chat_template_kwargs='{"enable_thinking": false}')
    assert config.chat_template_kwargs == {"enable_thinking": False}


def test_choices_suggest_the_nearest():
    with pytest.raises(InputError, match="did you mean 'relative'"):
        ESSAConfig(output_dir="run", offset_mode="relativ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parametrization": "lora", "alpha": 0.5}, "alpha is a setting of parametrization svd, got 0.5 with 'lora'"),
        (
            {"parametrization": "svd", "noise": "rademacher"},
            "noise is a setting of parametrization lora or lowrank or full",
        ),
        ({"parametrization": "full", "noise_rank": 2}, "noise_rank is a setting of parametrization lowrank, got 2"),
        (
            {"parametrization": "full", "quantization": "int8"},
            "quantization is a setting of parametrization svd or lora",
        ),
    ],
)
def test_settings_of_another_parametrisation_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        ESSAConfig(output_dir="run", **settings)


def test_a_whole_number_is_taken_for_a_float():
    assert ESSAConfig(output_dir="run", sigma=1).sigma == 1.0


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_r", 0), ("learning_rate", 0), ("max_steps", 0), ("batch_size", -1), ("lora_target_modules", "")],
)
def test_sft_settings_are_checked(name, value):
    with pytest.raises(InputError, match=name):
        SFTConfig(**{"output_dir": "adapter", name: value})


def test_suggest_is_silent_when_nothing_is_near():
    assert suggest("zebra", ["exact_match", "math"]) == ""
