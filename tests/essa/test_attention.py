"""transformers models attend by decode_attention where its contract holds, and by "sdpa" everywhere else."""

from __future__ import annotations

import pytest
import torch
from essa import attention
from essa.attention import attend, kernel_attention
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
IDS = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
PADDED = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=0.1)).eval()


@pytest.fixture
def calls(monkeypatch, native):
    """The shapes of the keys that the op has been called with."""
    shapes = []

    def counted(query, key, *arguments, **options):
        shapes.append(tuple(key.shape))
        return op(query, key, *arguments, **options)

    op = attention.decode_attention
    monkeypatch.setattr(attention, "decode_attention", counted)
    return shapes


def next_logits(model, mask, tokens=1):
    """Logits of a few tokens behind a prompt."""
    cache = model(input_ids=IDS, attention_mask=mask, use_cache=True).past_key_values
    seen = None if mask is None else torch.cat([mask, mask.new_ones(2, tokens)], 1)
    return model(input_ids=IDS[:, :tokens], attention_mask=seen, past_key_values=cache).logits


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_logits_are_those_of_sdpa(model, calls, mask):
    with torch.inference_mode():
        expected = next_logits(model, mask)
        assert not calls
        with kernel_attention(model):
            got = next_logits(model, mask)
    assert calls == [(2, 2, 6, 8)] * 2
    assert_close(got, expected)
    assert not torch.equal(next_logits(model, PADDED), next_logits(model, None))


def test_generate_has_it_by_name(model, calls, tmp_path):
    model.save_pretrained(tmp_path)
    named = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="essa")
    options = {"attention_mask": PADDED, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(named.generate(IDS, **options), model.generate(IDS, **options))
    assert len(calls) == 2 * 8


def test_a_layer_compiles_whole(model, native):
    layer = model.model.layers[0].self_attn
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (6, 9):
            query, key, value = torch.randn(2, 6, 1, 8), *torch.randn(2, 2, 2, length, 8)
            mask = torch.rand(2, 1, 1, length) < 0.7
            mask[..., -1] = True
            got, _ = compiled(layer, query, key, value, mask, scaling=0.3)
            assert_close(got, attend(layer, query, key, value, mask, scaling=0.3)[0])


def test_the_model_is_left_as_it_was(model):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), kernel_attention(model):
            assert model.config._attn_implementation == "essa"
            1 / 0  # noqa: B018
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("change", ["several tokens", "training", "gradients"])
def test_what_the_op_does_not_do_sdpa_does(model, calls, change):
    with kernel_attention(model):
        if change == "several tokens":
            with torch.inference_mode():
                next_logits(model, PADDED, tokens=2)
        elif change == "training":
            with torch.inference_mode():
                next_logits(model.train(), PADDED)
        else:
            next_logits(model, PADDED).sum().backward()
            assert model.model.layers[0].self_attn.q_proj.weight.grad.any()
    assert not calls


@pytest.mark.parametrize(
    ("mask", "by_the_op"),
    [
        (torch.ones(2, 1, 1, 6, dtype=torch.bool), True),
        (torch.ones(1, 1, 1, 6, dtype=torch.bool), True),
        (torch.zeros(2, 1, 1, 6), False),
        (torch.ones(2, 6, 1, 6, dtype=torch.bool), False),
        (torch.ones(2, 1, 1, 1, dtype=torch.bool), False),
    ],
    ids=["a row", "all rows", "added", "a head", "all positions"],
)
def test_masks(model, calls, mask, by_the_op):
    query, key, value = torch.randn(2, 6, 1, 8), *torch.randn(2, 2, 2, 6, 8)
    layer = model.model.layers[0].self_attn
    with torch.inference_mode():
        got, _ = attend(layer, query, key, value, mask, scaling=0.3)
        assert bool(calls) is by_the_op
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize("query_rows", [1, 3])
def test_rows_that_are_shared(model, calls, query_rows):
    query, (key, value) = torch.randn(query_rows, 6, 1, 8), torch.randn(2, 3, 2, 6, 8)
    with torch.inference_mode():
        got, _ = attend(model.model.layers[0].self_attn, query, key, value, None, scaling=0.3)
    assert got.shape == (3, 1, 6, 8)
    assert bool(calls) is (query_rows == 3)


GPT_OSS = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
FALCON = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}


def test_sinks_are_not_left_out():
    config = AutoConfig.for_model("gpt_oss", **GPT_OSS, attn_implementation="essa")
    with pytest.raises(ValueError, match=r'does what "sdpa" does; GptOssAttention needs more'):
        AutoModelForCausalLM.from_config(config)(input_ids=IDS)


def test_a_layer_that_asks_for_the_name_is_refused():
    query, (key, value) = torch.randn(2, 6, 1, 8), torch.randn(2, 2, 2, 6, 8)
    layer = FalconForCausalLM(FalconConfig(**FALCON)).transformer.h[0].self_attention
    with pytest.raises(ValueError, match="FalconAttention needs more or asks for that name"):
        attend(layer, query, key, value, None)


def test_no_kernel_no_change(model, calls, monkeypatch):
    monkeypatch.setattr(attention, "_has_kernel", lambda device_type: False)
    with torch.inference_mode(), kernel_attention(model):
        next_logits(model, PADDED)
    assert not calls


def test_models_that_do_more_with_the_name_keep_theirs(model):
    falcon = FalconForCausalLM(FalconConfig(**FALCON))
    with kernel_attention(falcon):
        assert falcon.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with kernel_attention(model):
        assert model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with kernel_attention(model.to("meta")):
        assert model.config._attn_implementation == "sdpa"
