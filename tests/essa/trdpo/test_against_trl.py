"""Step by step beside the installed TRL: the same model, rows, order and optimiser, fifty steps, in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from essa.config import InputError
from essa.trdpo import MovingReferenceCallback, TRDPOConfig, TRDPOTrainer
from peft import PeftModel, get_peft_model

from .conftest import make_judged, make_model, make_pairs

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 50
COMMON = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "logging_steps": 1,
    "beta": 0.3,
    "max_grad_norm": 2.0,
    # At 1e-8 Adam takes a whole step in the direction of a gradient's rounding error wherever the gradient is nought.
    "adam_epsilon": 1e-5,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 5,
}
THEIRS = {"bf16": False, "gradient_checkpointing": False}
SHARED_METRICS = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
MOVING = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 7}


def history(trainer):
    return [record for record in trainer.state.log_history if "loss" in record]


def assert_the_same(ours, theirs, metrics=SHARED_METRICS):
    assert len(history(ours)) == len(history(theirs)) == STEPS
    for mine, other in zip(history(ours), history(theirs), strict=True):
        for name in metrics:
            own = "kl/mismatched" if name == "kl" else name
            # A batch of KTO's may have rows of one kind alone.
            assert (own in mine) == (name in other), (mine["step"], name)
            if name in other:
                assert mine[own] == pytest.approx(other[name], rel=1e-4, abs=3e-5), (mine["step"], name)
    assert all(any(name in record for record in history(theirs)) for name in metrics)
    weights = dict(ours.model.named_parameters())
    for name, parameter in theirs.model.named_parameters():
        if ".ref." not in name:
            torch.testing.assert_close(weights[name], parameter, rtol=1e-5, atol=1e-5, msg=name)


def train_ours(model, rows, tokenizer, tmp_path, *, peft_config=None, **settings):
    args = TRDPOConfig(str(tmp_path / "ours"), report=False, **{**COMMON, "ref_update": "none", **settings})
    trainer = TRDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    return trainer


def make_trl(model, rows, tokenizer, tmp_path, *, kto=False, reference=None, peft_config=None, callbacks=None, **more):
    config, trainer = (trl.KTOConfig, trl.KTOTrainer) if kto else (trl.DPOConfig, trl.DPOTrainer)
    args = config(str(tmp_path / "trl"), **{**COMMON, **THEIRS, **more})
    return trainer(
        model, reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=peft_config, callbacks=callbacks,
    )  # fmt: skip


def train_trl(*args, **settings):
    trainer = make_trl(*args, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dpo_and_ipo(loss_type, moving, tokenizer, tmp_path, seed):
    model, rows = make_model("qwen3"), make_pairs(40, seed)
    other, reference = copy.deepcopy(model), copy.deepcopy(model)
    own, their = ({"ref_update": "soft", **MOVING}, {"sync_ref_model": True, **MOVING}) if moving else ({}, {})
    ours = train_ours(model, rows, tokenizer, tmp_path, loss_type=loss_type, **own)
    theirs = train_trl(other, rows, tokenizer, tmp_path, reference=reference, loss_type=loss_type, **their)
    assert_the_same(ours, theirs)
    assert ours.reference.updates == (STEPS // 7 if moving else 0)
    if moving:
        moved = dict(theirs.ref_model.named_parameters())
        for name, weights in ours.reference.weights().items():
            torch.testing.assert_close(weights, moved[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("moving", [False, True], ids=["fixed", "moving"])
def test_kto(moving, tokenizer, tmp_path, seed):
    model, rows = make_model(), make_judged(40, seed)
    other, reference = copy.deepcopy(model), copy.deepcopy(model)
    order = {"train_sampling_strategy": "sequential", "desirable_weight": 1.5, "loss_type": "kto"}
    own, their = ({"ref_update": "soft", **MOVING}, {"sync_ref_model": True, **MOVING}) if moving else ({}, {})
    ours = train_ours(model, rows, tokenizer, tmp_path, **order, **own)
    theirs = train_trl(other, rows, tokenizer, tmp_path, kto=True, reference=reference, **order, **their)
    assert_the_same(ours, theirs, (*SHARED_METRICS, "rewards/margins", "kl"))


@pytest.mark.parametrize("fresh", [True, False], ids=["new-adapter", "given-adapter"])
def test_lora(fresh, lora, tokenizer, tmp_path, seed):
    rows = make_pairs(40, seed)
    model = make_model()
    if not fresh:
        model = get_peft_model(model, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    other, config = copy.deepcopy(model), lora if fresh else None
    ours = train_ours(model, rows, tokenizer, tmp_path, peft_config=config)
    theirs = train_trl(other, rows, tokenizer, tmp_path, peft_config=config)
    assert isinstance(theirs.model, PeftModel)
    assert_the_same(ours, theirs)


def test_trl_itself_refuses_a_moving_reference_with_peft(lora, tokenizer, tmp_path):
    with pytest.raises(NotImplementedError, match="PEFT"):
        make_trl(make_model(), make_pairs(8), tokenizer, tmp_path, peft_config=lora, sync_ref_model=True)


def test_the_callback_gives_trl_a_moving_reference_with_peft(lora, tokenizer, tmp_path, seed):
    rows, model = make_pairs(40, seed), make_model()
    callback = MovingReferenceCallback(0.6, 7)
    theirs = train_trl(copy.deepcopy(model), rows, tokenizer, tmp_path, peft_config=lora, callbacks=[callback])
    ours = train_ours(model, rows, tokenizer, tmp_path, peft_config=lora, ref_update="soft", **MOVING)
    assert_the_same(ours, theirs)
    assert callback.last_update == ours.reference.last_update == 49
    for name, weights in ours.reference.weights().items():
        moved = theirs.model.get_parameter(name.replace(".default.", ".ref."))
        torch.testing.assert_close(weights, moved, rtol=1e-5, atol=1e-5, msg=name)


def test_the_callback_moves_trls_reference_model(tokenizer, tmp_path, seed):
    rows, model = make_pairs(40, seed), make_model()
    trainers = []
    for sync in (True, False):
        trainer = make_trl(
            copy.deepcopy(model),
            rows,
            tokenizer,
            tmp_path,
            reference=copy.deepcopy(model),
            sync_ref_model=sync,
            **MOVING,
        )
        if not sync:
            trainer.add_callback(MovingReferenceCallback(0.6, 7, ref_model=trainer.ref_model))
        trainer.train()
        trainers.append(trainer)
    assert_the_same(*trainers)


def test_the_callbacks_run_resumes_to_the_same_bits(lora, tokenizer, tmp_path, seed):
    rows, model = make_pairs(40, seed), make_model()

    def make(steps):
        callback = MovingReferenceCallback(0.3, 4)
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 10, "lr_scheduler_type": "constant"}
        return make_trl(
            copy.deepcopy(model), rows, tokenizer, tmp_path, peft_config=lora, callbacks=[callback], **settings
        )

    whole = make(20)
    whole.train()
    resumed = make(20)
    resumed.train(resume_from_checkpoint=str(tmp_path / "trl/checkpoint-10"))
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.1}, r"alpha must be a number in \[0, 1\], got 1.1"),
        ({"sync_steps": 0}, "sync_steps must be a whole number of at least 1, got 0"),
        ({"update": "sof"}, "update must be one of soft, hard, got 'sof'"),
    ],
)
def test_the_callback_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        MovingReferenceCallback(**settings)


def test_the_callback_without_peft_needs_the_reference_model(tokenizer, tmp_path):
    with pytest.raises(InputError, match=r"needs ref_model=trainer.ref_model"):
        make_trl(
            make_model(), make_pairs(8), tokenizer, tmp_path, reference=make_model(),
            callbacks=[MovingReferenceCallback()],
        )  # fmt: skip
