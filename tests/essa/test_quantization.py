"""Quantised bases: the population's delta goes on top of them as on any other, and what cannot be quantised is named."""

from __future__ import annotations

import sys

import pytest
import torch
from essa.config import InputError
from essa.demo.warm_start import BASE_MODEL
from essa.models import load_adapter, load_base
from essa.quantization import weight_bytes
from essa.rollout import generate
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from essa_kernels.nn import SVDLoRA

pytest.importorskip("torchao")

PRECISIONS = [("int8", "float32"), ("int8", "bfloat16"), ("int4", "bfloat16")]


@pytest.mark.parametrize(("quantization", "dtype"), PRECISIONS)
def test_a_population_on_a_quantised_base_says_what_its_members_say_alone(warm_start, problems, quantization, dtype):
    base, tokenizer = load_base(str(BASE_MODEL), quantization=quantization, dtype=dtype)
    model = load_adapter(base, warm_start)
    space = SVDLoRA.from_peft(model)
    generator = torch.Generator().manual_seed(0)
    values = space.spectrum * (1 + 0.3 * torch.randn(4, space.size, generator=generator))
    prompts = [row["prompt"] for row in problems[1]]
    rollout = generate(model, tokenizer, prompts, space=space, values=values, max_new_tokens=4)
    batch = tokenizer(prompts, return_tensors="pt")
    same = total = 0
    for member, completions in zip(values, rollout.completions, strict=True):
        space.load_(member)
        alone = model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch.input_ids.shape[1] :]
        for completion, tokens in zip(completions, alone.tolist(), strict=True):
            same += completion.token_ids == tokens[: len(completion.token_ids)]
            total += 1
    # In bfloat16 two tokens are now and then equally likely, and the batch they are in decides.
    assert same == total if dtype == "float32" else same >= 0.97 * total


def test_int4_takes_fewer_bytes_than_int8_and_int8_than_none():
    sizes = [
        weight_bytes(load_base(str(BASE_MODEL), quantization=quantization, dtype="bfloat16")[0])
        for quantization in ("none", "int8", "int4")
    ]
    parameters = sum(p.numel() for p in load_base(str(BASE_MODEL))[0].parameters())
    assert sizes[0] == pytest.approx(2 * parameters, rel=0.01)
    assert sizes[0] > 1.8 * sizes[1] > 1.8 * 1.3 * sizes[2]


def test_a_search_on_a_quantised_base_resumes_only_as_such(make_trainer):
    make_trainer(quantization="int8", generations=1).train()
    with pytest.raises(InputError, match="settings quantization was 'int8', now 'none'"):
        make_trainer(generations=2).train(resume_from_checkpoint=True)
    trainer = make_trainer(quantization="int8", generations=2)
    assert trainer.train(resume_from_checkpoint=True)["generations"] == 2
    # The adapter is an ordinary one: it fits the base that is not quantised.
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_MODEL), f"{trainer.args.output_dir}/adapter")


def test_a_model_that_arrives_quantised_is_taken_as_it_is(warm_start, problems, tmp_path):
    quantised, tokenizer = load_base(str(BASE_MODEL), quantization="int8")
    quantised.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arrived, _ = load_base(str(tmp_path / "model"))
    assert weight_bytes(arrived) == weight_bytes(quantised)
    model = load_adapter(arrived, warm_start)
    space = SVDLoRA.from_peft(model)
    prompts = [row["prompt"] for row in problems[1]]
    again = generate(model, tokenizer, prompts, space=space, values=space.spectrum[None], max_new_tokens=4)
    plain = generate(load_adapter(quantised, warm_start), tokenizer, prompts, max_new_tokens=4)
    assert again.completions == plain.completions
    with pytest.raises(InputError, match="is quantised already"):
        load_base(str(tmp_path / "model"), quantization="int8")


def test_routed_experts_are_named(tokenizer, tmp_path):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 16,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("qwen3_moe", vocab_size=64, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_base(str(tmp_path))
    message = "'int8': the experts of Qwen3MoeForCausalLM, 70% of its parameters, cannot be quantised"
    with pytest.raises(InputError, match=message):
        load_base(str(tmp_path), quantization="int8")


def test_what_cannot_be_quantised_is_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="quantization must be one of none, int8, int4, got 'int3'"):
        load_base(str(BASE_MODEL), quantization="int3")
    with pytest.raises(InputError, match="dtype must be auto or bfloat16, got 'float32'"):
        load_base(str(BASE_MODEL), quantization="int4", dtype="float32")
    for name, settings, message in (
        ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "GPT2LMHeadModel, with no nn.Linear, cannot be quantised"),
        (
            "llama",
            {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
            r"q_proj, \[48, 48\], cannot be quantised; int4 needs input features in multiples of 32",
        ),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, vocab_size=20, **settings))
        model.save_pretrained(tmp_path / name)
        load_base(str(BASE_MODEL))[1].save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=message):
            load_base(str(tmp_path / name), quantization="int4")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"needs torchao: pip install 'essa-kernels\[quant\]'"):
        load_base(str(BASE_MODEL), quantization="int8")
