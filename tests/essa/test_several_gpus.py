"""A model on a GPU, or spread over two, computes what it does on the CPU. The GPUs are pretended."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import essa.models
import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from essa.checkpoint import Run
from essa.chunks import places_of
from essa.config import InputError
from essa.demo.warm_start import BASE_MODEL
from essa.devices import cross_between_blocks, free_memory_for
from essa.messages import pack, unpack
from essa.models import ModelSource, load_base, weight_digests
from essa.replica import Recipe, Replica
from essa.rollout import generate
from transformers import AutoModelForCausalLM, OPTConfig

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
MEMBERS = Perturbed(NoiseKey(5), 0.05, range(4))
SMALL = {"generations": 3, "row_budget": 24}


def spread(model, parts=None):
    """As transformers' device_map "balanced" does on two GPUs."""
    parts = PLACES if parts is None else parts
    for part, device in parts.items():
        model.get_submodule(part).to(device)
    model.tie_weights()
    return dispatch_model(model, parts, main_device=FIRST, skip_keys=model._skip_keys_device_placement)


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
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**20 * (2 + 3 * device.index), 2**30))
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
    args = dataclasses.replace(trainer.args, num_workers=1, gpus_per_worker=2)
    source = ModelSource(str(BASE_MODEL), warm_start)
    recipe = Recipe(source, args, None, trainer.train_prompts, trainer.eval_prompts, "exact_match", weights)
    asked = {name: last[name] for name in ("generation", "prompts", "candidates")}
    news = [*(pack({"told": record}) for record in history), pack({"asked": {**asked, "epoch": 0.0}})]
    told = np.array(last["rewards"])
    rewards, scores = [], {}
    with gpus():
        replica = Replica(recipe)
        replica.start()
        assert places(replica._task.model) == {FIRST, SECOND}
        replica.hear(news)
        for rows in replica._search.chunks(len(last["prompts"])):
            request = pack({"rows": [rows.start, rows.stop]})
            rewards += unpack(replica.evaluate(request, []))["rewards"].tolist()
            if "scores" in last:
                members, _ = replica._search.asked(2, told, [])
                reply = unpack(replica.score(request, [pack({"rewards": told})]))
                asked_of = places_of(replica._search, rows, len(last["prompts"]), members)
                scores.update(zip(asked_of.tolist(), reply["scores"].tolist(), strict=True))
    assert rewards == [reward for member in last["rewards"] for reward in member]
    if method == "zo-grpo":
        torch.testing.assert_close([scores[place] for place in sorted(scores)], last["scores"][0], rtol=1e-5, atol=0)


def test_inputs_change_gpus_between_parts_only(gpus):
    """accelerate's hooks on what lies inside a part would cost time in every layer."""
    with gpus():
        model, _ = load_base(str(BASE_MODEL), device="balanced")
    hooked = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert hooked == {"", *PLACES}


def test_hooks_on_shared_modules_and_forwards_of_their_own_stay():
    class Block(torch.nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.own, self.patched, self.shared = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), shared

    shared = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleList([Block(shared), Block(shared)])
    model._no_split_modules = ["Block"]
    for block in model:
        block.patched.forward = lambda x: 2 * x
        for module in (block, block.own, block.patched, block.shared):
            add_hook_to_module(module, AlignDevicesHook(torch.device("cpu")))
    cross_between_blocks(model)
    for block in model:
        assert "_hf_hook" in vars(block) and "_hf_hook" in vars(block.shared)
        assert "forward" not in vars(block.own) and "_hf_hook" not in vars(block.patched)
        assert block.patched(torch.ones(2)).tolist() == [2.0, 2.0]


def test_a_model_that_its_owner_has_spread_can_be_searched(gpus, tokenizer):
    def completions(model):
        space = LowRankNoise(model)
        before = [vars(module).get("forward") for module in model.modules()]
        rollout = generate(model, tokenizer, ["3+4=", "12+7="], space=space, values=MEMBERS, max_new_tokens=4)
        assert [vars(module).get("forward") for module in model.modules()] == before
        return rollout.completions

    model, _ = load_base(str(BASE_MODEL), device="cpu")
    alone = completions(model)
    with gpus():
        assert completions(spread(model)) == alone


def test_memory_is_counted_where_the_blocks_are(gpus):
    """One block of three on a GPU with 2 MiB, two on one with 5: the first is full when there are 6 in all."""
    with gpus():
        alone, _ = load_base(str(BASE_MODEL), device="cuda")
        both, _ = load_base(str(BASE_MODEL), device="balanced")
        assert free_memory_for(alone) == 2 * 2**20 and free_memory_for(both) == 6 * 2**20


WHOLE_LAYERS = {
    "model.layers": SECOND,
    "model.embed_tokens": FIRST,
    "model.rotary_emb": SECOND,
    "model.norm": SECOND,
    "lm_head": FIRST,
}


def test_a_list_of_layers_may_be_one_part(gpus, monkeypatch, tokenizer):
    """accelerate's map has it so where the first GPU has room for the embedding alone; a list has no forward to hook."""
    monkeypatch.setattr(f"{__name__}.PLACES", WHOLE_LAYERS)
    alone, _ = load_base(str(BASE_MODEL), device="cpu")
    with gpus():
        model, _ = load_base(str(BASE_MODEL), device="balanced")
        assert places(model) == {FIRST, SECOND}
        got = generate(model, tokenizer, ["3+4=", "12+7="], max_new_tokens=4).completions
    assert got == generate(alone, tokenizer, ["3+4=", "12+7="], max_new_tokens=4).completions


def test_a_layer_that_is_a_part_is_given_its_input_on_its_own_gpu(gpus):
    config = OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(12).view(4, 3)

    def logits(model, device):
        space = LowRankNoise(model)
        assert "model.decoder.project_out" in space.names
        with torch.inference_mode(), space.attach(MEMBERS) as population:
            population.assign(torch.arange(5))
            return model(input_ids=ids.to(device)).logits.cpu()

    alone = logits(model, "cpu")
    parts = ("embed_tokens", "embed_positions", "final_layer_norm", "project_out", "project_in", "layers")
    on = {f"model.decoder.{part}": SECOND if part == "layers" else FIRST for part in parts} | {"lm_head": FIRST}
    with gpus():
        torch.testing.assert_close(logits(spread(model, on), FIRST), alone)


def test_a_forward_put_over_accelerates_hook_is_refused(gpus, monkeypatch):
    model, _ = load_base(str(BASE_MODEL), device="cpu")
    space, (_, layer) = LowRankNoise(model), LowRankNoise(model)._layers[0]
    with gpus():
        spread(model)
        for attribute in ("forward", "_old_forward"):
            with monkeypatch.context() as patch:
                patch.setitem(vars(layer), attribute, lambda x: x)
                with pytest.raises(RuntimeError, match="has been replaced already"), space.attach(MEMBERS):
                    pass
        with space.attach(MEMBERS):
            pass


def test_fewer_gpus_than_there_are_is_said(gpus, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with gpus():
        load_base(str(BASE_MODEL), device="balanced")
    assert "base_model is spread over 2 of 4 GPUs" in caplog.text


def test_what_cannot_be_spread_is_refused(gpus, monkeypatch):
    with pytest.raises(InputError, match="device must be auto, cpu, cuda, cuda:N or balanced, got 'all'"):
        load_base(str(BASE_MODEL), device="all")
    model, _ = load_base(str(BASE_MODEL), device="cpu")
    monkeypatch.setattr(f"{__name__}.spread", lambda _: model)
    for elsewhere in ("cpu", "disk"):
        model.hf_device_map = {"model": FIRST, "lm_head": elsewhere}
        with pytest.raises(InputError, match="does not fit into the memory of the GPUs, of which torch sees 2"):
            load_base(str(BASE_MODEL), device="balanced")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device 'balanced' spreads a model over GPUs, torch sees none"):
        load_base(str(BASE_MODEL), device="balanced")
