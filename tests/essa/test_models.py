from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from essa.config import InputError
from essa.demo.warm_start import BASE_MODEL
from essa.devices import pick_device
from essa.models import (
    PROBED,
    context_length,
    fingerprint,
    load_adapter,
    load_base,
    merge_adapter,
    probe,
    tokenizer_of,
)
from essa.rollout import generate
from essa.scoring import log_probabilities
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from essa_kernels.nn import SVDLoRA


@pytest.fixture
def base():
    return load_base(str(BASE_MODEL))[0]


@pytest.fixture
def adapter(warm_start, tmp_path):
    """A copy of the warm start, to be damaged."""
    return shutil.copytree(warm_start, tmp_path / "adapter")


def test_a_base_model_comes_in_the_dtype_asked_for():
    for dtype, expected in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        model, tokenizer = load_base(str(BASE_MODEL), dtype=dtype)
        assert model.dtype == expected and not model.training
        assert tokenizer.pad_token_id is not None
    with pytest.raises(InputError, match="dtype must be one of auto, float32, bfloat16, float16, got 'int8'"):
        load_base(str(BASE_MODEL), dtype="int8")


def test_pickled_weights_are_refused(base, adapter, tmp_path):
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"it has no adapter_model\.safetensors"):
        load_adapter(base, str(adapter))
    folder = shutil.copytree(BASE_MODEL, tmp_path / "base")
    (folder / "model.safetensors").unlink()
    torch.save(base.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(folder))


def test_a_configuration_that_brings_in_code_is_refused(tmp_path):
    """transformers would fetch the kernel and run it, whatever trust_remote_code says."""
    folder = shutil.copytree(BASE_MODEL, tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attn_implementation": "somebody/attention"}))
    with pytest.raises(InputError, match="brings in a kernel from the hub, attn_implementation 'somebody/attention'"):
        load_base(str(folder))
    load_base(str(folder), attn_implementation="sdpa")


def test_a_damaged_adapter_is_named(base, adapter):
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"adapter .* cannot be read"):
        load_adapter(base, str(adapter))
    weights.write_bytes(whole)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(InputError, match=r"adapter .* cannot be read"):
        load_adapter(base, str(adapter))


def test_another_kind_of_adapter_is_named(base, adapter):
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(InputError, match="must be a LoRA adapter, got"):
        load_adapter(base, str(adapter))


def test_the_fingerprint_is_that_of_base_and_adapter(base, warm_start):
    model = load_adapter(base, warm_start)
    first = fingerprint(model)
    assert fingerprint(load_adapter(load_base(str(BASE_MODEL))[0], warm_start)) == first
    model.config.rope_theta = 5.0
    assert fingerprint(model)["base_config"] != first["base_config"]
    weight = next(tensor for name, tensor in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert fingerprint(model)["adapter"] != first["adapter"]


def test_the_fingerprint_probes_every_weight_beneath_the_adapter(base, warm_start):
    model = load_adapter(base, warm_start)
    first = fingerprint(model)["base_weights"]
    for name, weight in model.named_parameters():
        if "lora_" not in name:
            with torch.no_grad():
                weight.neg_()
            assert fingerprint(model)["base_weights"] != first, name
            with torch.no_grad():
                weight.neg_()
    assert fingerprint(model)["base_weights"] == first


def test_a_probe_is_small_and_meets_every_column():
    width = 1024
    columns = torch.arange(width).repeat(width, 1)
    seen = np.frombuffer(probe(columns), dtype=np.float32)
    assert len(seen) <= PROBED and len(set(seen)) > PROBED / 2
    assert probe(torch.tensor(3.0)) == np.float32(3).tobytes()


@pytest.mark.parametrize(("turned", "dtype"), [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)])
def test_merging_rounds_one_operation_at_a_time(turned, dtype):
    """As any device rounds alike: numpy's float32 arithmetic, which fuses nothing, makes the same weights to the bit."""
    base = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=20)
        if turned
        else AutoConfig.for_model("llama", hidden_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=20)
    )
    name = "c_fc" if turned else "q_proj"
    model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, target_modules=[name], fan_in_fan_out=turned))
    (layer,) = (module for module in model.modules() if hasattr(module, "lora_A"))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    factors = [getattr(layer, part)["default"].to(dtype).weight for part in ("lora_A", "lora_B")]
    a, b, weight = (part.detach().float().numpy() for part in (*factors, layer.base_layer.weight.clone()))
    delta = np.zeros((len(b), a.shape[1]), np.float32)
    for rank in range(3):
        delta = delta + b[:, rank, None] * a[rank]
    delta = delta * np.float32(7 / 3)
    merged = merge_adapter(model).get_submodule(
        "transformer.h.0.mlp.c_fc" if turned else "model.layers.0.self_attn.q_proj"
    )
    assert np.array_equal(merged.weight.detach().numpy(), weight + (delta.T if turned else delta))


def test_devices_and_context(base):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="device must be auto, cpu, cuda, cuda:N or balanced, got 'gpu'"):
        pick_device("gpu")
    assert context_length(base) == base.config.max_position_embeddings


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 16),
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}, 16),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 2}, 16),
    ],
)
def test_scaled_rotations_reach_further(rope, expected):
    config = SimpleNamespace(max_position_embeddings=16, rope_parameters=rope)
    assert context_length(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))) == expected


def test_an_empty_tokenizer_is_refused(base, tmp_path):
    base.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"there is no tokenizer at .*: its tokenizer knows special tokens alone"):
        tokenizer_of(model)
    with pytest.raises(InputError, match="cannot be loaded: its tokenizer knows special tokens alone"):
        load_base(str(tmp_path))


def test_the_head_is_given_its_input_in_one_piece(warm_start):
    """Or a frozen weight is copied for every row: see `essa.models.whole_head_input`."""
    base, tokenizer = load_base(str(BASE_MODEL))
    model = load_adapter(base, warm_start)
    given = []
    hook = base.get_output_embeddings().register_forward_hook(lambda head, inputs, logits: given.append(inputs[0]))
    space = SVDLoRA.from_peft(model)
    ids = tokenizer(["1+2=", "3+4="])["input_ids"]
    generate(model, tokenizer, ["1+2=", "3+4="], max_new_tokens=2)
    log_probabilities(model, ids, [[5, 6], [7, 8]], space=space, values=space.spectrum.repeat(2, 1))
    hook.remove()
    assert len(given) == 3 and all(x.shape[0] == 2 and x.is_contiguous() for x in given)
    assert not base.get_output_embeddings()._forward_pre_hooks
