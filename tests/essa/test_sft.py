from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from essa.config import InputError, SFTConfig
from essa.demo.warm_start import BASE_MODEL
from essa.models import load_adapter, load_base
from essa.sft import sft
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from essa_kernels.nn import SVDLoRA

ROWS = [{"prompt": f"?{a:02d}+01=", "completion": "111"} for a in range(20)]


def train(folder, rows=ROWS, **settings):
    model, tokenizer = load_base(str(BASE_MODEL))
    losses = []
    small = {"max_steps": 30, "batch_size": 8, "learning_rate": 5e-3}
    sft(model, tokenizer, rows, SFTConfig(str(folder), **{**small, **settings}), log=lambda *at: losses.append(at))
    return losses


def test_it_learns_the_completions_and_plain_peft_loads_them(tmp_path, tokenizer):
    losses = train(tmp_path / "deep" / "adapter")
    assert [step for step, _ in losses] == list(range(1, 31))
    assert losses[-1][1] < 0.3 * losses[0][1]
    model = load_adapter(load_base(str(BASE_MODEL))[0], str(tmp_path / "deep" / "adapter"))
    out = model.generate(**tokenizer(["?33+01="], return_tensors="pt"), max_new_tokens=6, do_sample=False)
    text = tokenizer.decode(out[0, 7:]).replace(" ", "")
    assert text == "111" + tokenizer.eos_token
    config = json.loads((tmp_path / "deep" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 8 and "lm_head" not in config["target_modules"] and len(config["target_modules"]) == 7


def test_it_is_its_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, max_steps=3, seed=seed)
    a, b, c = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc")
    assert a == b and a != c


def test_the_loss_is_that_of_the_completion_alone(tmp_path, tokenizer):
    model, _ = load_base(str(BASE_MODEL))
    (_, loss), *_ = train(tmp_path / "adapter", rows=ROWS[:1], max_steps=1, batch_size=1)
    ids = torch.tensor([[*tokenizer(ROWS[0]["prompt"] + "111").input_ids, tokenizer.eos_token_id]])
    logits = model(input_ids=ids).logits[0, 6:-1]
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, ids[0, 7:]).item(), abs=1e-5)


def test_rows_of_unequal_length_do_not_disturb_each_other(tmp_path):
    rows = [{"prompt": "?1+1=", "completion": "2"}, {"prompt": "?10+10=", "completion": "020"}]
    (_, both), *_ = train(tmp_path / "both", rows=rows, max_steps=1, batch_size=2)
    (_, one), *_ = train(tmp_path / "one", rows=rows[:1], max_steps=1, batch_size=1)
    (_, two), *_ = train(tmp_path / "two", rows=rows[1:], max_steps=1, batch_size=1)
    assert both == pytest.approx((2 * one + 4 * two) / 6, abs=1e-5)


def test_messages(tmp_path, chat_tokenizer):
    rows = [
        {"prompt": [{"role": "user", "content": "01+01="}], "completion": [{"role": "assistant", "content": "111"}]}
    ]
    chat_tokenizer.chat_template = "{% for m in messages %}{{ mark if m.role == 'user' }}{{ m.content }}{% endfor %}"
    model, _ = load_base(str(BASE_MODEL))
    losses = []
    args = SFTConfig(str(tmp_path / "adapter"), max_steps=1, batch_size=1, chat_template_kwargs={"mark": "="})
    rows[0]["chat_template_kwargs"] = {"mark": "?"}
    sft(model, chat_tokenizer, rows, args, log=lambda step, loss: losses.append(loss))
    ids = torch.tensor([chat_tokenizer("?01+01=111").input_ids])
    model, _ = load_base(str(BASE_MODEL))
    logits = model(input_ids=ids).logits[0, 6:-1]
    assert losses == [pytest.approx(torch.nn.functional.cross_entropy(logits, ids[0, 7:]).item(), abs=1e-5)]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "dataset is empty"),
        (ROWS, {"chat_template_kwargs": {"mark": "?"}}, "needs prompts that are messages"),
        ([{"prompt": "?1+1="}], {}, "row 0: `completion` must be text, got None"),
        ([{"prompt": "?1+1=", "completion": 2}], {}, "row 0: `completion` must be text, got 2"),
        ([{"prompt": "?1+1=", "completion": "\udfff"}], {}, "row 0: half a surrogate pair"),
        ([{"prompt": "?1+1=", "completion": "1" * 99}], {}, "row 0: prompt and completion have 105 tokens"),
        (ROWS, {"lora_target_modules": "no_such"}, "lora_target_modules 'no_such'"),
        (ROWS, {"learning_rate": 1e36}, r"learning_rate 1e\+36 is too high"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, rows, settings, message):
    with pytest.raises(InputError, match=message):
        train(tmp_path / "adapter", rows, **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tmp_path):
    Path(tmp_path, "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output_dir .* not empty"):
        train(tmp_path)
    assert Path(tmp_path, "notes.txt").read_text() == "mine"


def test_of_a_multimodal_model_only_what_text_goes_through_is_adapted(tmp_path, tokenizer):
    """Gemma 3 is loaded with its image tower, which no reward of text would keep from drifting."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    image = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**text, "num_attention_heads": 4, "num_key_value_heads": 2},
        vision_config={**image, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    sft(model, tokenizer, ROWS, SFTConfig(str(tmp_path / "adapter"), max_steps=2, batch_size=4))
    names = list(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert len(names) == 2 * 7 and all(".language_model." in name for name in names)
    everywhere = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"vision_tower.*: LoRA on what text does not go through is not supported"):
        SVDLoRA.from_peft(everywhere)
