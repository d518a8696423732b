"""A model on a GPU, or spread over two, computes what it does on the CPU. The GPUs are pretended."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import essa.models
import pytest
import torch
from accelerate import dispatch_model
from essa.checkpoint import Run
from essa.config import InputError
from essa.demo.warm_start import BASE_MODEL
from essa.models import ModelSource, load_base, weight_digests
from essa.rollout import generate
from essa.row_budget import choose_row_budget
from essa.workers import Recipe, Replica, pack, unpack

from essa_kernels import NoiseKey
from essa_kernels.nn import LowRankNoise, Perturbed

from ..pretended_gpus import pretended

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
PLACES = {
    "model.embed_tokens": FIRST,
    "model.rotary_emb": FIRST,
    "model.layers.0": FIRST,
    "model.layers.1": SECOND,
    "model.layers.2": SECOND,
    "model.norm": SECOND,
    "lm_head": FIRST,
}
METHODS = {
    "svd": {"strategy": "cma"},
    "lora": {"strategy": "es", "parametrization": "lora", "optimizer": "adam"},
    "lowrank": {"strategy": "es", "parametrization": "lowrank", "optimizer": "momentum", "perturbation": "completion"},
    "full": {"strategy": "es", "parametrization": "full", "population_size": 4, "weight_decay": 0.1},
}
SMALL = {"generations": 3, "row_budget": 24}


def spread(model):
    """As transformers' device_map "balanced" does on two GPUs."""
    for part, device in PLACES.items():
        model.get_submodule(part).to(device)
    model.tie_weights()
    return dispatch_model(model, PLACES, main_device=FIRST, skip_keys=model._skip_keys_device_placement)


@pytest.fixture
def gpus(monkeypatch):
    """Two pretended ones, there inside the context that it makes, and a `from_pretrained` that knows of them."""
    load = essa.models.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, *, device_map, **options):
        model = load(name, **options)
        if device_map == "balanced":
            return spread(model)
        if device_map[""].type == "cuda":
            model.to(FIRST).tie_weights()
        return model

    monkeypatch.setattr(essa.models.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**21 * (1 + device.index), 2**30))
    return lambda: pretended(monkeypatch)


def places(model) -> set[torch.device]:
    return {parameter.device for parameter in model.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_a_gpu_ends_as_one_on_the_cpu(make_trainer, gpus, method):
    alone = make_trainer("alone", **SMALL, **METHODS[method], eval_steps=2)
    alone.train()
    with gpus():
        trainer = make_trainer("run", **SMALL, **METHODS[method], eval_steps=2, device="cuda")
        assert places(trainer.model) == {FIRST}
        trainer.train()
    for one, other in zip(*(Run.read(run.args.output_dir).records for run in (trainer, alone)), strict=True):
        assert one.get("rewards") == other.get("rewards") and one.get("candidates") == other.get("candidates")
    written = list(Path(alone.args.output_dir, alone.search.space.output).glob("*.safetensors"))
    assert written
    for file in written:
        assert Path(trainer.args.output_dir, file.parent.name, file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("method", [*METHODS, "zo-grpo"])
def test_a_worker_of_two_gpus_agrees_with_a_driver_on_the_cpu(make_trainer, warm_start, gpus, method):
    trainer = make_trainer(**SMALL, **METHODS.get(method, {"strategy": method}))
    weights = weight_digests(trainer.model)
    trainer.train()
    *history, last = [record for record in Run.read(trainer.args.output_dir).records if "rewards" in record]
    args = dataclasses.replace(trainer.args, gpus_per_worker=2)
    source = ModelSource(str(BASE_MODEL), warm_start)
    recipe = Recipe(source, args, None, trainer.train_prompts, trainer.eval_prompts, "exact_match", weights)
    asked = {"generation": 2, "prompts": last["prompts"], "epoch": 0.0, "history": history}
    rewards, scores = [], {}
    with gpus():
        replica = Replica(recipe)
        replica.start()
        assert places(replica._task.model) == {FIRST, SECOND}
        for rows in replica._search.chunks(len(last["prompts"])):
            asked["rows"] = [rows.start, rows.stop]
            rewards += unpack(replica.evaluate(pack({**asked, "candidates": last["candidates"]})))["rewards"]
            if "scores" in last:
                reply = unpack(replica.score(pack({**asked, "rewards": last["rewards"], "scores": []})))
                scores.update(zip(reply["places"], reply["scores"], strict=True))
    assert rewards == [reward for member in last["rewards"] for reward in member]
    if method == "zo-grpo":
        torch.testing.assert_close([scores[place] for place in sorted(scores)], last["scores"][0], rtol=1e-5, atol=0)


def test_inputs_change_gpus_between_parts_only(gpus):
    """accelerate's hooks on what lies inside a part would cost time in every layer."""
    with gpus():
        model, _ = load_base(str(BASE_MODEL), device="balanced")
    hooked = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert hooked == {"", *PLACES}


def test_a_model_that_its_owner_has_spread_can_be_searched(gpus, tokenizer):
    def completions(model):
        space = LowRankNoise(model)
        before = [vars(module).get("forward") for module in model.modules()]
        members = Perturbed(NoiseKey(5), 0.05, range(4))
        rollout = generate(model, tokenizer, ["3+4=", "12+7="], space=space, values=members, max_new_tokens=4)
        assert [vars(module).get("forward") for module in model.modules()] == before
        return rollout.completions

    model, _ = load_base(str(BASE_MODEL), device="cpu")
    alone = completions(model)
    with gpus():
        assert completions(spread(model)) == alone


def test_row_budget_counts_the_memory_of_all_gpus(make_trainer, gpus, monkeypatch):
    monkeypatch.setattr("essa.row_budget._tokens_a_second", lambda *arguments: arguments[-2])
    with gpus():
        alone = make_trainer("alone", device="cuda")
        both = make_trainer("both", device="balanced")
        one, two = (
            choose_row_budget(
                run.model, run.processing_class, run.search.space, ["3+4="], most=2**20, max_new_tokens=8
            )[0]
            for run in (alone, both)
        )
    assert two == 2 * one


def test_what_cannot_be_spread_is_refused(gpus, monkeypatch):
    with pytest.raises(InputError, match="device must be auto, cpu, cuda, cuda:N or balanced, got 'all'"):
        load_base(str(BASE_MODEL), device="all")
    monkeypatch.setitem(PLACES, "model.norm", "cpu")
    with gpus(), pytest.raises(InputError, match="base_model' does not fit into 2 GPUs"):
        load_base(str(BASE_MODEL), device="balanced")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device 'balanced' spreads a model over GPUs, torch sees none"):
        load_base(str(BASE_MODEL), device="balanced")
