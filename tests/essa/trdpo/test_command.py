"""`essa trdpo`, from the command line to the adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from essa.cli import app
from essa.demo.task import write_jsonl
from essa.demo.warm_start import BASE_MODEL
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from .conftest import make_judged, make_pairs

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--logging_steps", "2", "--learning_rate", "1e-3"]
SMALL += ["--ref_model_sync_steps", "2", "--device", "cpu", "--save_steps", "3"]


def essa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def command(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(30))
    names = ["--model_name_or_path", BASE_MODEL, "--dataset_name", tmp_path / "pairs.jsonl"]
    return ["trdpo", *names, "--output_dir", tmp_path / "run", *SMALL]


def weights(folder):
    return Path(folder, "adapter_model.safetensors").read_bytes()


def test_pairs_to_adapter_and_back_from_a_checkpoint(command, tmp_path):
    result = essa(*command, "--eval_split", "0.2", "--eval_steps", "3")
    assert result.exit_code == 0, result.output
    for words in ("step 6/6: loss", "reference moved at step 6", "evaluation: loss", "adapter: ", "report.html"):
        assert words in result.output
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/adapter")
    assert (tmp_path / "run/report.html").is_file()
    before = weights(tmp_path / "run/adapter")

    refused = essa(*command)
    assert refused.exit_code == 2 and "already holds a run" in refused.stderr
    for path in (tmp_path / "run/checkpoint-6").iterdir():
        path.unlink()
    resumed = essa("trdpo", "--resume_from_checkpoint", tmp_path / "run")
    assert resumed.exit_code == 0, resumed.output
    assert "step 4/6" in resumed.output and "step 2/6" not in resumed.output
    assert weights(tmp_path / "run/adapter") == before


def test_a_yaml_file_and_kto_on_the_whole_model(command, tmp_path):
    write_jsonl(tmp_path / "judged.jsonl", make_judged(30))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"loss_type": "kto", "beta": 0.2, "ref_update": "hard"}))
    options = ["--config", tmp_path / "run.yaml", "--dataset_name", tmp_path / "judged.jsonl", "--lora_r", "0"]
    result = essa(*command, *options, "--ref-update", "soft")
    assert result.exit_code == 0, result.output
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    recorded = json.loads((tmp_path / "run/trdpo.json").read_text())
    assert (recorded["loss_type"], recorded["beta"], recorded["ref_update"]) == ("kto", 0.2, "soft")


def test_from_a_given_adapter(command, warm_start, tmp_path):
    result = essa(*command, "--adapter", warm_start, "--save_steps", "0", "--attn_implementation", "eager")
    assert result.exit_code == 0, result.output
    assert "<td>eager</td>" in (tmp_path / "run/report.html").read_text()
    assert weights(tmp_path / "run/adapter") != weights(warm_start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ref_model_mixup_alpha", "1.5"], "ref_model_mixup_alpha must be a finite number of at least 0"),
        (["--ref_model_sync_steps", "0"], "ref_model_sync_steps must be a whole number of at least 1, got 0"),
        (["--loss_type", "dpo"], "loss_type must be one of sigmoid, ipo, kto, got 'dpo'"),
        (["--precompute_ref_log_probs"], "precompute_ref_log_probs must be false where the reference moves"),
        (["--loss_type", "kto", "--dataset_name", "missing.jsonl"], "'missing.jsonl': no such file"),
        (["--lora_target_modules", "nowhere"], "peft_config does not fit this model"),
        (
            ["--adapter", "./any", "--lora_r", "16"],
            "lora_r is of a new adapter and must not be given with adapter, got 16",
        ),
        (["--lora_r", "0", "--lora_alpha", "8"], "lora_alpha is of a new adapter and must not be given with lora_r 0"),
        (["--logging_steps", "nan"], "logging_steps must be a finite number above 0, got nan"),
        (["--warmup_steps", "nan"], "warmup_steps must be a finite number of at least 0, got nan"),
        (["--adapter", "./missing"], "adapter './missing' is not a folder"),
        (["--lr_scheduler_type", "steep"], "steep"),
        (["--attn_implementation", "flex_attention"], "attn_implementation 'flex_attention' needs a GPU"),
        (["--attn_implementation", "sharp"], 'attn_implementation="sharp"'),
        (["--quantization", "int4", "--lora_r", "0"], "quantization must be none with lora_r 0"),
        (["--quantization", "int4", "--dtype", "float32"], "dtype must be auto or bfloat16, got 'float32'"),
        (["--max_length", "3"], "leaves nothing of max_length 3"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(command, tmp_path, options, message):
    result = essa(*command, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "run/trdpo.json").exists()


def test_half_a_surrogate_pair_is_named(command, tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "?1", "chosen": "2", "rejected": "3\\ud800"}\n')
    result = essa(*command)
    assert result.exit_code == 2 and "row 0: half a surrogate pair, '\\ud800', is no character" in result.stderr


def test_a_run_is_not_resumed_with_other_options(command, tmp_path):
    assert essa(*command).exit_code == 0
    before = (tmp_path / "run/trdpo.json").read_bytes()
    resume = ["trdpo", "--resume_from_checkpoint", tmp_path / "run"]
    refused = essa(*resume, "--lora_r", "2", "--loss_type", "ipo")
    assert refused.exit_code == 2
    assert "lora_r was 16, now 2" in refused.stderr and "loss_type was 'sigmoid', now 'ipo'" in refused.stderr
    assert (tmp_path / "run/trdpo.json").read_bytes() == before
    elsewhere = essa(*resume, "--output_dir", tmp_path / "elsewhere")
    assert elsewhere.exit_code == 2 and "must be the run's own output_dir" in elsewhere.stderr
    longer = essa(*resume, "--max_steps", "8")
    assert longer.exit_code == 0 and "step 8/8" in longer.output


def test_a_run_that_is_reported_elsewhere_is_resumed(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "transformers.trainer.get_reporting_integration_callbacks", lambda names: asked.append(names) or []
    )
    assert essa(*command, "--report_to", "tensorboard,wandb").exit_code == 0
    resumed = essa("trdpo", "--resume_from_checkpoint", tmp_path / "run", "--max_steps", "8")
    assert resumed.exit_code == 0 and "step 8/8" in resumed.output, resumed.output
    assert asked == [["tensorboard", "wandb"]] * 2


def test_a_run_stopped_before_its_first_checkpoint_is_started_anew(command, tmp_path, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("essa.trdpo.command.TRDPOTrainer.training_step", stop)
        stopped = essa(*command)
    assert stopped.exit_code == 130 and "before the first checkpoint (save_steps 3): start it anew" in stopped.output
    assert essa(*command).exit_code == 0


def test_there_must_be_a_checkpoint_to_resume(command, tmp_path):
    result = essa("trdpo", "--resume_from_checkpoint", tmp_path / "nothing")
    assert result.exit_code == 2 and "no run to resume" in result.stderr
    assert essa(*command, "--save_steps", "0").exit_code == 0
    result = essa("trdpo", "--resume_from_checkpoint", tmp_path / "run")
    assert result.exit_code == 2 and "no checkpoint to resume" in result.stderr
