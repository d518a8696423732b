"""One sequence for a prompt and its completions, and one of packed sequences, give what separate sequences give, for every
supported family."""

from __future__ import annotations

import contextlib
import copy
import logging

import numpy as np
import pytest
import torch
import transformers
from essa.config import InputError
from essa.trdpo.batches import PACKED, PADDED, SHARED, Collator
from essa.trdpo.data import Example
from essa.trdpo.logprobs import install, sequence_sums, token_logps
from essa.trdpo.shared_prompt import FAMILIES as SUPPORTED
from essa.trdpo.shared_prompt import branching, why_not

from .conftest import FAMILIES, make_model


def examples(sizes):
    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    tokens = [[rng.integers(3, 97, size, dtype=np.int32) for size in row] for row in sizes]
    return [Example(number, prompt, tuple(rest)) for number, (prompt, *rest) in enumerate(tokens)]


SIZES = [(12, 5, 9), (1, 1, 1), (20, 1, 7), (3, 11, 2)]


def by_hand(model, rows):
    """[B, 2] sums of log-probabilities from the model's own logits, one sequence at a time."""
    sums = []
    for example in rows:
        for completion in example.completions:
            ids = torch.tensor(np.concatenate((example.prompt, completion))).long()
            logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            predicted = torch.arange(len(example.prompt), len(ids))
            sums.append(logps[predicted - 1, ids[predicted]].sum())
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_models_own(family, seed):
    model, rows = make_model(family).eval(), examples(SIZES)
    original = copy.deepcopy(model)
    expected = by_hand(original, rows)
    install(model)
    for layout in (PADDED, PACKED, SHARED):
        assert why_not(model) is None
        batch = Collator(0, layout)(rows)
        model.zero_grad(set_to_none=True)
        with contextlib.nullcontext() if layout == PADDED else branching(model):
            found = sequence_sums(token_logps(model, batch), batch)
            (found * torch.tensor([1.0, -0.7])).sum().backward()
        torch.testing.assert_close(found, expected.double(), rtol=2e-5, atol=2e-4)
        original.zero_grad(set_to_none=True)
        (by_hand(original, rows) * torch.tensor([1.0, -0.7])).sum().backward()
        for (name, ours), theirs in zip(model.named_parameters(), original.parameters(), strict=True):
            scale = theirs.grad.abs().max().item() + 1e-3
            torch.testing.assert_close(ours.grad / scale, theirs.grad / scale, rtol=1e-3, atol=2e-4, msg=name)
    torch.testing.assert_close(model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape, torch.Size([1, 3, 97]))


FLEXIBLE = [family for family in FAMILIES if make_model(family)._supports_flex_attn]


def compare_flex_attention(family):
    model, rows = make_model(family).eval(), examples(SIZES)
    with torch.no_grad():
        expected = by_hand(model, rows)
        model.set_attn_implementation("flex_attention")
        assert why_not(model) is None
        install(model)
        for layout in (PACKED, SHARED):
            batch = Collator(0, layout)(rows)
            with branching(model):
                found = sequence_sums(token_logps(model, batch), batch)
            assert model.config._attn_implementation == "flex_attention"
            torch.testing.assert_close(found, expected.double(), rtol=2e-5, atol=2e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("family", FLEXIBLE)
def test_flex_attention_gives_what_separate_sequences_give(family, seed):
    """Uncompiled, and forward only: on the CPU it has no backward pass."""
    with torch.compiler.set_stance("force_eager"):
        compare_flex_attention(family)


@pytest.mark.slow
def test_compiled_flex_attention_gives_what_separate_sequences_give(seed):
    compare_flex_attention("gemma3")


@pytest.mark.skipif(not hasattr(transformers, "Llama4TextConfig"), reason="an older transformers")
def test_a_text_model_that_does_not_know_its_base(seed):
    """Llama 4's text model was cut out of a larger one, whose name for the base it keeps."""
    model, rows = make_model("Llama4Text", num_local_experts=4, intermediate_size_mlp=48).eval(), examples(SIZES)
    assert model.base_model is model
    with torch.no_grad():
        expected = by_hand(copy.deepcopy(model), rows)
        install(model)
        batch = Collator(0, PADDED)(rows)
        found = sequence_sums(token_logps(model, batch), batch)
    torch.testing.assert_close(found, expected.double(), rtol=2e-5, atol=2e-4)


def test_other_attention_is_named():
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    assert why_not(model) == (
        "attn_implementation must be one of eager, sdpa, flex_attention for it, got 'flash_attention_2'"
    )


def test_every_supported_family_is_tested():
    assert {make_model(family).config.model_type for family in FAMILIES} == SUPPORTED


def test_other_families_are_named():
    model = make_model("Mamba")
    assert "'mamba'" in why_not(model)


def test_gradient_checkpointing_runs_along_the_branches(seed):
    model, rows = make_model("qwen3").train(), examples(SIZES)
    install(model)
    batch, gradients = Collator(0, SHARED)(rows), []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        with branching(model):
            token_logps(model, batch).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_a_model_that_swallows_the_branches_is_refused(seed):
    model = make_model()
    install(model)
    with branching(model), pytest.raises(RuntimeError, match="hands no branches"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_the_reason_is_logged(caplog, tokenizer, tmp_path):
    from essa.trdpo import TRDPOConfig, TRDPOTrainer

    from .conftest import make_pairs

    for prompt_sharing, text in (
        (True, "prompts are computed twice, not shared, and batches are padded: models of type 'mamba'"),
        (False, "batches are padded: models of type 'mamba'"),
    ):
        caplog.clear()
        args = TRDPOConfig(str(tmp_path), use_cpu=True, prompt_sharing=prompt_sharing)
        with caplog.at_level(logging.WARNING):
            TRDPOTrainer(make_model("Mamba"), args=args, train_dataset=make_pairs(4), processing_class=tokenizer)
        (warning,) = [record.getMessage() for record in caplog.records if "padded" in record.getMessage()]
        assert warning.startswith(text)


def test_flex_attention_is_not_trained_on_the_cpu(tokenizer, tmp_path):
    from essa.trdpo import TRDPOConfig, TRDPOTrainer

    from .conftest import make_pairs

    model = make_model()
    model.set_attn_implementation("flex_attention")
    args = TRDPOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match="attn_implementation 'flex_attention' needs a GPU"):
        TRDPOTrainer(model, args=args, train_dataset=make_pairs(4), processing_class=tokenizer)


def test_a_head_that_does_more_than_we_know_is_refused():
    model = make_model()
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(InputError, match="LlamaForCausalLM changes its logits in a way that is not known here"):
        install(model)


def test_a_copy_of_the_model_runs_the_copy(seed):
    model, ids = make_model(), torch.arange(3, 9)[None]
    install(model)
    other = copy.deepcopy(model).double()
    assert other(ids).logits.dtype == torch.float64 and model(ids).logits.dtype == torch.float32
