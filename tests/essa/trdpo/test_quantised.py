"""TR-DPO on a quantised base."""

from __future__ import annotations

import re

import pytest
import torch
from essa.cli import app
from essa.config import InputError
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL
from essa.models import load_base
from essa.trdpo import TRDPOConfig, TRDPOTrainer
from peft import AutoPeftModelForCausalLM
from typer.testing import CliRunner

from .conftest import make_pairs

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = ["--max_steps", "24", "--per_device_train_batch_size", "6", "--logging_steps", "8", "--learning_rate", "2e-3"]
SMALL += ["--device", "cpu", "--save_steps", "12", "--lora_r", "4", "--beta", "0.5", "--ref_update", "none"]


def essa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def pairs(tmp_path):
    task.write_jsonl(tmp_path / "pairs.jsonl", make_pairs(12))
    return tmp_path / "pairs.jsonl"


@pytest.fixture
def arrived(tmp_path):
    """A model folder whose weights are int8 already."""
    model, tokenizer = load_base(str(BASE_MODEL), quantization="int8")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_it_learns_and_resumes(pairs, tmp_path, quantization):
    run = tmp_path / "run"
    names = ["--model_name_or_path", BASE_MODEL, "--dataset_name", pairs, "--output_dir", run]
    result = essa("trdpo", *names, *SMALL, "--quantization", quantization)
    assert result.exit_code == 0, result.output
    losses = [float(loss) for loss in re.findall(r"step \d+/24: loss ([\d.]+)", result.output)]
    assert len(losses) == 3 and losses[2] < 0.8 * losses[0], losses
    # The adapter is an ordinary one, also on the base that is not quantised.
    AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    before = (run / "adapter/adapter_model.safetensors").read_bytes()
    for path in (run / "checkpoint-24").iterdir():
        path.unlink()
    resumed = essa("trdpo", "--resume_from_checkpoint", run)
    assert resumed.exit_code == 0, resumed.output
    assert (run / "adapter/adapter_model.safetensors").read_bytes() == before


def test_a_base_that_arrives_quantised(arrived, pairs, tmp_path):
    names = ["--model_name_or_path", arrived, "--dataset_name", pairs, "--output_dir", tmp_path / "run"]
    result = essa("trdpo", *names, *SMALL)
    assert result.exit_code == 0, result.output
    whole = essa("trdpo", *names[:-1], tmp_path / "whole", *SMALL, "--lora_r", "0")
    assert whole.exit_code == 2 and "a model that is quantised cannot be trained as a whole" in whole.stderr


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_that_is_quantised_is_taken_with_an_adapter_alone(lora, tmp_path, quantization):
    model, tokenizer = load_base(str(BASE_MODEL), quantization=quantization)
    args = TRDPOConfig(str(tmp_path), use_cpu=True, max_steps=2, report=False, save_strategy="no", disable_tqdm=True)
    given = {"args": args, "train_dataset": make_pairs(8), "processing_class": tokenizer}
    with pytest.raises(InputError, match="quantised cannot be trained as a whole"):
        TRDPOTrainer(model, **given)
    trainer = TRDPOTrainer(model, peft_config=lora, **given)
    assert "_hf_peft_config_loaded" not in vars(trainer.model)
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)


def test_evaluating_a_quantised_base(warm_start, tmp_path):
    task.write_jsonl(tmp_path / "rows.jsonl", task.rows(task.split("validation")[:8]))
    names = ["--model_name_or_path", BASE_MODEL, "--adapter", warm_start, "--dataset_name", tmp_path / "rows.jsonl"]
    result = essa("eval", *names, "--reward", "exact_match", "--max_new_tokens", "4", "--quantization", "int8")
    assert result.exit_code == 0 and '"samples": 8' in result.stdout, result.output
