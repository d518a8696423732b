"""The gradient of every trained weight in one whole step, beside float64: each sequence on its own, the papers' equations."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainerCallback

from .conftest import make_judged, make_model, make_pairs

pytestmark = pytest.mark.filterwarnings("ignore")
BETA, ROWS = 0.2, 8


class Gradients(TrainerCallback):
    """Keeps what the optimiser is about to be given."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def logp(model, prompt, completion):
    ids = torch.tensor([*prompt, *completion])
    logps = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[len(prompt) :, None]).sum()


def ratios(policy, reference, prompts, completions):
    """log pi(y | x) - log pi_ref(y | x) of each row, float64 [rows]."""
    with torch.no_grad():
        fixed = [reference(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    return torch.stack([logp(policy, p, c) for p, c in zip(prompts, completions, strict=True)]) - torch.stack(fixed)


def oracle(loss_type, examples, policy, reference):
    prompts = [example.prompt for example in examples]
    first = ratios(policy, reference, prompts, [example.completions[0] for example in examples])
    if loss_type == "kto":
        shifted = [examples[i - 1].completions[0] for i in range(len(examples))]
        with torch.no_grad():
            kl = ratios(policy, reference, prompts, shifted).mean().clamp(min=0)
        sign = torch.tensor([1.0 if example.desirable else -1.0 for example in examples], dtype=torch.float64)
        weight = torch.where(sign > 0, 1.5, 0.7)
        return (weight * (1 - torch.sigmoid(BETA * sign * (first - kl)))).mean()
    second = ratios(policy, reference, prompts, [example.completions[1] for example in examples])
    if loss_type == "ipo":
        lengths = torch.tensor([[len(completion) for completion in example.completions] for example in examples])
        return (first / lengths[:, 0] - second / lengths[:, 1] - 1 / (2 * BETA)).square().mean()
    return -torch.sigmoid(BETA * (first - second)).log().mean()


@pytest.mark.parametrize("sharing", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("whole", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "kto"])
def test_gradients_of_a_whole_step(make, loss_type, whole, sharing, seed):
    rows = make_judged(ROWS, seed) if loss_type == "kto" else make_pairs(ROWS, seed)
    settings = {"max_steps": 1, "per_device_train_batch_size": ROWS, "max_grad_norm": 1e9, "prompt_sharing": sharing}
    settings |= {"loss_type": loss_type, "beta": BETA, "train_sampling_strategy": "sequential"}
    settings |= {"desirable_weight": 1.5, "undesirable_weight": 0.7} if loss_type == "kto" else {}
    start, seen = make_model("qwen3"), Gradients()
    other = {"ref_model": start} if whole else {}
    trainer = make(make_model("qwen3"), rows, whole=whole, callbacks=[seen], **other, **settings)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    policy = copy.deepcopy(trainer.model).double().eval()
    start = start.double().eval()

    def reference(prompt, completion):
        if whole:
            return logp(start, prompt, completion)
        with policy.disable_adapter():
            return logp(policy, prompt, completion)

    trainer.train()
    oracle(loss_type, [trainer.train_dataset[i] for i in range(ROWS)], policy, reference).backward()
    expected = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    assert seen.found.keys() == expected.keys()
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert size > 1e-3
    for name, gradient in expected.items():
        error = (seen.found[name].double() - gradient).norm()
        assert error < 1e-4 * gradient.norm() + 1e-6 * size, name
