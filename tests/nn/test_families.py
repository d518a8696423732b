"""A batched population against PEFT, which is given one member at a time."""

from __future__ import annotations

import pytest
import torch
from essa.rollout import generate

from essa_kernels.nn import SVDLoRA

from .conftest import ENDS, FAMILIES, MORE_FAMILIES, build, perturbed

MEMBERS = 3
PROMPTS = ["7 3 40 12 21 33 8 15 2", "30 11 4", "25", "6 6 14 44 38 20 17"]


@pytest.fixture(
    scope="module", params=[*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)]
)
def model(request):
    return build(request.param)


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_those_of_each_member_in_peft(model, tokenizer, padded):
    space = SVDLoRA.from_peft(model)
    values = perturbed(space, MEMBERS)
    prompts = PROMPTS if padded else PROMPTS[:1] * 2
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad(), space.attach(values) as population:
        population.assign(torch.arange(MEMBERS + 1) * len(prompts))
        repeated = {name: tensor.repeat(MEMBERS, 1) for name, tensor in batch.items()}
        logits = model(**repeated).logits.unflatten(0, (MEMBERS, -1))

    seen = batch["attention_mask"].bool()
    own = space.spectrum.clone()
    for member in range(MEMBERS):
        space.load_(values[member])
        with torch.no_grad():
            expected = model(**batch).logits[seen]
        error = (logits[member][seen] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max()
    space.load_(own)
    spread = (logits[0] - logits[1])[seen].abs().max()
    assert spread > 1e-2 * logits.abs().max(), "the members must differ for this to prove anything"


def test_greedy_completions_are_those_of_each_member_in_peft(model, tokenizer):
    space = SVDLoRA.from_peft(model)
    values = perturbed(space, MEMBERS)
    rollout = generate(model, tokenizer, PROMPTS, space=space, values=values, max_new_tokens=12)

    without_padding = generate(model, tokenizer, PROMPTS[:1], space=space, values=values, max_new_tokens=12)
    for completions, (alone,) in zip(rollout.completions, without_padding.completions, strict=True):
        assert alone.token_ids == completions[0].token_ids

    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    own = space.spectrum.clone()
    for member in range(MEMBERS):
        space.load_(values[member])
        output = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for completion, tokens in zip(rollout.completions[member], output.tolist(), strict=True):
            length = len(completion.token_ids)
            assert completion.token_ids == tokens[:length]
            assert not any(tokens[length:]), "what follows the end must be padding"
            assert completion.finished == (tokens[length - 1] in ENDS)
    space.load_(own)
    lengths = {len(c.token_ids) for completions in rollout.completions for c in completions}
    assert len(lengths) > 1, "rows must end at different times for this to prove anything"
