"""The trainer: its limits, resuming, what it saves and logs, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset
from essa.config import InputError
from essa.trdpo import TRDPOConfig, TRDPOTrainer
from essa.trdpo.data import read_preferences
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from .conftest import make_judged, make_model, make_pairs

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(trainer):
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_limits_of_the_moving_reference(make, whole, seed):
    """alpha = 0 never moves; alpha = 1 is hard; with tau = 1 the reference is the policy at every step."""
    base = make_model()
    runs = {
        "never": {"ref_update": "none"},
        "off": {"sync_ref_model": False},
        "zero": {"ref_model_mixup_alpha": 0.0},
        "one": {"ref_model_mixup_alpha": 1.0},
        "hard": {"ref_update": "hard"},
        "every": {"ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1, "logging_steps": 1},
    }
    trainers = {name: make(copy.deepcopy(base), whole=whole, **settings) for name, settings in runs.items()}
    weights = {name: trained(trainer) for name, trainer in trainers.items()}
    for name in ("off", "zero"):
        assert_equal(weights["never"], weights[name])
    assert_equal(weights["one"], weights["hard"])
    assert any(not torch.equal(weights["never"][name], tensor) for name, tensor in weights["hard"].items())
    assert trainers["never"].reference.updates == 0 and trainers["zero"].reference.distance() == 0
    every = [record for record in trainers["every"].state.log_history if "loss" in record]
    assert all(record["loss"] == pytest.approx(math.log(2), abs=1e-5) for record in every)
    assert all(record["rewards/margins"] == pytest.approx(0, abs=1e-5) for record in every)
    assert_equal(weights["every"], trainers["every"].reference.weights())


@pytest.mark.parametrize("padding_free", [True, False])
def test_sharing_prompts_changes_nothing(make, padding_free, seed):
    base = make_model("qwen3")
    losses = []
    for prompt_sharing, shape in ((True, [4, 3]), (False, [8, 2] if padding_free else None)):
        trainer = make(copy.deepcopy(base), prompt_sharing=prompt_sharing, padding_free=padding_free, logging_steps=1)
        branches = trainer.data_collator(trainer.train_dataset[:4]).get("branches")
        assert shape == (None if branches is None else list(branches.shape))
        trainer.train()
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full", "kto", "bf16"])
def test_a_resumed_run_ends_in_the_same_bits(make, kind, tmp_path, seed):
    base = make_model("qwen2")
    settings = {"save_strategy": "steps", "save_steps": 4, "whole": kind == "full", "learning_rate": 5e-3}
    rows = make_judged(24) if kind == "kto" else None
    settings |= {"loss_type": "kto"} if kind == "kto" else {"bf16": True} if kind == "bf16" else {}
    whole = make(copy.deepcopy(base), rows, **settings)
    end = trained(whole)
    resumed = make(copy.deepcopy(base), rows, name="again", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    assert_equal(end, {name: p for name, p in resumed.model.named_parameters() if p.requires_grad})
    assert_equal(whole.reference.weights(), resumed.reference.weights())
    assert resumed.reference.last_update == whole.reference.last_update == 6
    state = json.loads((tmp_path / "run/checkpoint-4/reference.json").read_text())
    assert (state["last_update"], state["updates"], state["ref_update"]) == (3, 1, "soft")
    # Not because there was nothing left to do.
    assert whole.reference.distance() > 0 and resumed.reference.distance() == whole.reference.distance()


def test_a_checkpoint_without_its_reference_is_refused(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=4)
    trainer.train()
    (tmp_path / "run/checkpoint-4/reference.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no reference\.safetensors"):
        make(name="again").train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
def test_the_policy_is_saved_as_any_other(make, whole, tmp_path, seed):
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = make(base, whole=whole)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    load = AutoModelForCausalLM if whole else AutoPeftModelForCausalLM
    loaded, ids = load.from_pretrained(str(tmp_path / "policy")).eval(), torch.randint(3, 97, (2, 7))
    assert not list((tmp_path / "policy").rglob("*ref*"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_what_is_logged(make, loss_type, pictures, tmp_path, seed):
    rows = make_judged(24) if loss_type == "kto" else make_pairs(24)
    evaluation = make_judged(9, 7) if loss_type == "kto" else make_pairs(9, 7)
    trainer = make(rows=rows, loss_type=loss_type, eval_dataset=evaluation, eval_strategy="steps", eval_steps=4,
                   report=True, run_name="a <run>")  # fmt: skip
    trainer.train()
    steps = [record for record in trainer.state.log_history if "loss" in record]
    names = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    names |= {"logps/rejected", "kl/policy_reference", "kl/policy_initial"}
    assert all(names | {"reference/distance", "reference/updates"} <= record.keys() for record in steps)
    assert [record["reference/last_update"] for record in steps] == [0, 3, 6, 6]
    assert steps[0]["kl/policy_reference"] == steps[0]["kl/policy_initial"] and steps[0]["reference/distance"] == 0
    assert steps[-1]["kl/policy_initial"] > steps[-1]["kl/policy_reference"] > 0 < steps[-1]["reference/distance"]
    evaluated = [record for record in trainer.state.log_history if "eval_loss" in record]
    assert len(evaluated) == 2 and all({f"eval_{name}" for name in names} <= record.keys() for record in evaluated)
    page = (tmp_path / "run/report.html").read_text()
    for words in ("a &lt;run&gt;", "moves towards it every 3 steps, by 0.6 of the way", "evaluation accuracy"):
        assert words in page
    assert (tmp_path / "run/report.png").read_bytes().startswith(b"\x89PNG")
    # Alone, evaluation says the same.
    assert trainer.evaluate(evaluation)["eval_loss"] == pytest.approx(evaluated[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "kto"])
def test_metrics_by_hand(make, loss_type, seed):
    """One step over all rows, beside float64 log-probabilities of every sequence on its own."""
    rows = make_judged(12) if loss_type == "kto" else make_pairs(12)
    settings = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 12, "learning_rate": 0.0}
    trainer = make(rows=rows, loss_type=loss_type, train_sampling_strategy="sequential", **settings)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    trainer.train()
    logged = next(record for record in trainer.state.log_history if "loss" in record)

    exact = copy.deepcopy(trainer.model).double().eval()
    examples = [trainer.train_dataset[i] for i in range(12)]

    def tokens(prompt, completion):
        ids = torch.tensor(np.concatenate((prompt, completion))).long()
        places = torch.arange(len(prompt), len(ids))
        return exact(ids[None]).logits[0].log_softmax(-1)[places - 1, ids[places]]

    def logps():
        pairs = [[tokens(e.prompt, c) for c in e.completions] for e in examples]
        mismatched = [tokens(e.prompt, examples[i - 1].completions[0]).sum() for i, e in enumerate(examples)]
        return pairs, torch.stack(mismatched)

    with torch.no_grad():
        policy, policy_kl = logps()
        with exact.disable_adapter():
            reference, reference_kl = logps()
    ratio = torch.tensor(
        [[(p - r).sum() for p, r in zip(*row, strict=True)] for row in zip(policy, reference, strict=True)]
    )
    sums = torch.tensor([[p.sum() for p in row] for row in policy])
    beta = 0.2
    if loss_type == "kto":
        good = torch.tensor([e.desirable for e in examples])
        kl = (policy_kl - reference_kl).mean().clamp(min=0)
        loss = 1 - torch.sigmoid(beta * torch.where(good, ratio[:, 0] - kl, kl - ratio[:, 0]))
        chosen, rejected, correct = ratio[good, 0], ratio[~good, 0], (ratio[:, 0] > 0) == good
        chosen_logps = sums[good, 0]
        margins = beta * (chosen.mean() - rejected.mean())
    else:
        chosen, rejected = ratio.unbind(1)
        length = torch.tensor([[len(c) for c in e.completions] for e in examples])
        per_token = (ratio / length)[:, 0] - (ratio / length)[:, 1]
        loss = (
            (per_token - 1 / (2 * beta)) ** 2
            if loss_type == "ipo"
            else -torch.sigmoid(beta * (chosen - rejected)).log()
        )
        correct, chosen_logps, margins = chosen > rejected, sums[:, 0], beta * (chosen - rejected).mean()
    differences = torch.cat([p - r for row in zip(policy, reference, strict=True) for p, r in zip(*row, strict=True)])
    expected = {
        "loss": loss.mean(),
        "rewards/chosen": beta * chosen.mean(),
        "rewards/rejected": beta * rejected.mean(),
        "rewards/margins": margins,
        "rewards/accuracies": correct.double().mean(),
        "logps/chosen": chosen_logps.mean(),
        "kl/policy_reference": 0.5 * differences.square().mean(),
        "kl/policy_initial": 0.5 * differences.square().mean(),
    }
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name


def test_precomputed_reference(make, seed):
    base = make_model()
    plain = make(copy.deepcopy(base), ref_update="none", eval_dataset=make_pairs(5, 3))
    before = make(copy.deepcopy(base), ref_update="none", eval_dataset=make_pairs(5, 3), precompute_ref_log_probs=True)
    first, second = trained(plain), trained(before)
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-4, atol=1e-5)
    assert plain.evaluate()["eval_loss"] == pytest.approx(before.evaluate()["eval_loss"], rel=1e-4)


def test_a_given_reference_and_a_hub_dataset(make, seed):
    base, other = make_model(), make_model()
    trainer = make(base, Dataset.from_list(make_pairs(12)), whole=True, ref_model=other, max_steps=2)
    trainer.train()
    first = next(record for record in trainer.state.log_history if "loss" in record)
    assert abs(first["rewards/margins"]) > 1e-3


class Spoil(TrainerCallback):
    """Makes a weight, or the gradient, NaN at a step."""

    def __init__(self, event, step):
        self._step, self._gradient = step, event == "on_pre_optimizer_step"
        setattr(self, event, self._spoil)

    def _spoil(self, args, state, control, model=None, **kwargs):
        if state.global_step == self._step:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            (parameter.grad if self._gradient else parameter.data).view(-1)[-1] = torch.nan


ROWS = r"for rows \[\d+, \d+, \d+, \d+\]"


@pytest.mark.parametrize(
    ("event", "step", "message"),
    [
        ("on_step_end", 5, "the loss is nan at step 6, "),
        ("on_step_end", 4, "the weights are not finite after step 4, "),
        ("on_step_end", 3, "the weights are not finite after step 3, "),
        ("on_step_end", 8, "the weights are not finite after step 8, "),
        ("on_pre_optimizer_step", 3, "the gradient is not finite at step 4, "),
    ],
    ids=["between", "save", "move", "last", "gradient"],
)
def test_what_is_not_finite_stops_the_run_names_the_batch_and_is_not_saved(make, tmp_path, seed, event, step, message):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    moving = {"ref_model_sync_steps": 3 if step == 3 else 100}
    trainer = make(callbacks=[Spoil(event, step)], **saving, **moving)
    last = 4 if step == 5 else 6 if step == 8 else 2
    with pytest.raises(InputError, match=rf"{message}{ROWS}.* the last checkpoint is '.*checkpoint-{last}'"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{last}"]
    assert all(tensor.isfinite().all() for tensor in trainer.reference.weights().values())
    resumed = make(**saving, **moving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"run/checkpoint-{last}"))
    assert resumed.state.global_step == 8
    assert all(tensor.isfinite().all() for tensor in resumed.model.parameters())


def test_all_batches_of_a_step_are_named(make, seed):
    trainer = make(callbacks=[Spoil("on_pre_optimizer_step", 1)], gradient_accumulation_steps=2)
    with pytest.raises(InputError, match=r"step 2, for rows \[(\d+, ){7}\d+\] of the dataset; learning_rate 0.005 may"):
        trainer.train()


def test_weights_that_end_up_not_finite_are_not_the_result(make, seed):
    with pytest.raises(InputError, match="the weights are not finite after step 8"):
        make(callbacks=[Spoil("on_step_end", 8)], ref_update="none").train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ref_model_mixup_alpha": 1.5}, "ref_model_mixup_alpha must be a finite number of at least 0 and at most 1"),
        ({"ref_model_mixup_alpha": -0.1}, "ref_model_mixup_alpha"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be a whole number of at least 1, got 0"),
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs must be false where the reference moves"),
        ({"loss_type": "sigmod"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"label_smoothing": 0.6}, "label_smoothing"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "0 unless loss_type is sigmoid"),
        ({"ref_update": "medium"}, "ref_update must be one of soft, hard, none"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_wrong_settings(settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        TRDPOConfig(str(tmp_path), **settings)


def test_the_papers_defaults():
    args = TRDPOConfig("x", use_cpu=True)
    assert (args.ref_model_mixup_alpha, args.ref_model_sync_steps, args.beta) == (0.6, 512, 0.05)
    assert (args.learning_rate, args.max_grad_norm, args.ref_update, args.sync_ref_model) == (1e-6, 2.0, "soft", True)


def test_wrong_models(make, tokenizer, peft_model, tmp_path):
    with pytest.raises(InputError, match="peft_config must be a LoraConfig, got IA3"):
        TRDPOTrainer(make_model(), args=TRDPOConfig(str(tmp_path)), train_dataset=make_pairs(4),
                     processing_class=tokenizer, peft_config=peft.IA3Config(task_type="CAUSAL_LM"))  # fmt: skip
    with pytest.raises(InputError, match="carries an adapter already"):
        TRDPOTrainer(peft_model, args=TRDPOConfig(str(tmp_path)), train_dataset=make_pairs(4),
                     processing_class=tokenizer, peft_config=LoraConfig())  # fmt: skip
    with pytest.raises(InputError, match="processing_class must be given"):
        TRDPOTrainer(make_model(), train_dataset=make_pairs(4))
    model = make_model()
    with pytest.raises(InputError, match="ref_model must be another model"):
        make(model, ref_model=model)
    with pytest.raises(InputError, match="ref_model must be a model, loaded by its user, got 'some/model'"):
        make(model, ref_model="some/model")
    with pytest.raises(InputError, match="train_dataset is required"):
        TRDPOTrainer(model)
    with pytest.raises(InputError, match="model must be a name, a PeftModel or a transformers model, got Linear"):
        make(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="at least 2 with loss_type kto"):
        make(rows=make_judged(8), loss_type="kto", per_device_train_batch_size=1)


def test_rows_must_fit_into_the_models_context(make, tokenizer):
    model = make_model(max_position_embeddings=12)
    rows = [{"prompt": "?1+1=", "chosen": "2", "rejected": rejected} for rejected in ("33", "12345678")]
    preferences = read_preferences(rows, tokenizer, name="pairs", kto=False, max_length=None)
    for given, name in ((rows, "train_dataset"), (preferences, "pairs")):
        for most in (None, 1024):
            with pytest.raises(
                InputError, match=f"{name} row 1 has 14 tokens, more than the model's context of 12; set"
            ):
                make(model, given, max_length=most)
    trainer = make(model, rows, max_length=12, max_steps=1)
    trainer.train()
    with pytest.raises(InputError, match="eval_dataset row 1 has 14 tokens"):
        make(model, rows[:1], max_length=None).evaluate(rows)


def test_checkpoints_hold_no_second_adapter(make, tmp_path):
    make(save_strategy="steps", save_steps=8).train()
    names = {path.name for path in Path(tmp_path / "run/checkpoint-8").iterdir()}
    assert {"adapter_model.safetensors", "reference.safetensors", "reference.json"} <= names
    assert not [path for path in Path(tmp_path / "run/checkpoint-8").iterdir() if path.is_dir()]


def test_several_gpus_in_one_process_are_refused(make, monkeypatch):
    monkeypatch.setattr(TRDPOConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="start one process each"):
        make()
