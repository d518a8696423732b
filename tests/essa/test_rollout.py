"""Decoding a population: independent of the batching, exact against transformers, sampled from the right distribution."""

from __future__ import annotations

import pytest
import torch
from essa.config import InputError
from essa.rollout import generate
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from essa_kernels.nn import SVDLoRA

VOCABULARY = 32
ENDS = [1, 7, 11, 20]
EQUAL = ["3 4 5 6", "8 9 10 12", "30 2 2 14"]
RAGGED = ["3 4 5 6 22 23", "8", "30 2 14"]


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def build():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        bos_token_id=None,
        eos_token_id=ENDS,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def space(model):
    return SVDLoRA.from_peft(model)


@pytest.fixture(scope="module")
def values(space):
    generator = torch.Generator().manual_seed(3)
    return space.spectrum * (1 + 0.5 * torch.randn(6, space.size, generator=generator))


def ids(rollout):
    return [[completion.token_ids for completion in completions] for completions in rollout.completions]


@pytest.mark.parametrize("prompts", [EQUAL, RAGGED], ids=["equal", "ragged"])
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_completions_do_not_depend_on_the_batching(model, tokenizer, space, values, prompts, temperature):
    def run(**options):
        return ids(
            generate(
                model, tokenizer, prompts, space=space, values=values, max_new_tokens=10, temperature=temperature,
                seed=4, generation=9, **options
            )
        )  # fmt: skip

    expected = run()
    assert [len(completions) for completions in expected] == [3] * 6
    assert len({str(completions) for completions in expected}) > 1
    for row_budget in (1, 4, 7, 9):
        assert run(row_budget=row_budget) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_per_prompt_gives_each_member_its_own_prompt(model, tokenizer, space, values, temperature):
    options = {"space": space, "values": values, "max_new_tokens": 10, "temperature": temperature}
    everything = generate(model, tokenizer, RAGGED, **options).completions
    own = generate(model, tokenizer, RAGGED, assignment="per_prompt", row_budget=4, **options)
    assert own.completions == [[everything[m][m // 2]] for m in range(6)]
    assert own.tokens == sum(len(completions[0].token_ids) for completions in own.completions)


@pytest.mark.parametrize("prompts", [EQUAL, RAGGED], ids=["equal", "ragged"])
def test_the_model_as_it_is_answers_as_transformers_does(model, tokenizer, prompts):
    rollout = generate(model, tokenizer, prompts, max_new_tokens=12)
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch["input_ids"].shape[1] :]
    (completions,) = rollout.completions
    for completion, tokens in zip(completions, output.tolist(), strict=True):
        assert completion.token_ids == tokens[: len(completion.token_ids)]
        assert completion.finished == (completion.token_ids[-1] in ENDS)
        assert completion.finished or len(completion.token_ids) == 12
        said = completion.token_ids[: -1 if completion.finished else None]
        assert completion.text == " ".join(str(token) for token in said if token > 1)
    assert rollout.tokens == sum(len(completion.token_ids) for completion in completions)
    assert rollout.seconds > 0


def test_ended_rows_leave_the_batch(model, tokenizer, space, values):
    sizes = []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        rollout = generate(model, tokenizer, RAGGED, space=space, values=values, max_new_tokens=30)
    finally:
        hook.remove()
    assert sizes[0] == 18 and sizes == sorted(sizes, reverse=True) and sizes[-1] < 9
    for completions in rollout.completions:
        for completion in completions:
            assert not set(completion.token_ids[:-1]) & set(ENDS), "nothing follows an end token"


def test_samples_follow_the_softmax(model, tokenizer, space):
    draws, temperature = 4000, 0.7
    rollout = generate(
        model, tokenizer, ["3 4 5"], space=space, values=space.spectrum.repeat(draws, 1), max_new_tokens=1,
        temperature=temperature, seed=1,
    )  # fmt: skip
    counts = torch.zeros(VOCABULARY)
    for (completion,) in rollout.completions:
        counts[completion.token_ids[0]] += 1
    with torch.no_grad():
        expected = (model(torch.tensor([[3, 4, 5]])).logits[0, -1] / temperature).softmax(-1) * draws
    chi_square = ((counts - expected).square() / expected)[expected > 5].sum()
    freedom = int((expected > 5).sum()) - 1
    assert freedom > 5
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_samples_are_keyed(model, tokenizer, space):
    def run(**key):
        same = space.spectrum.repeat(4, 1)
        return ids(
            generate(
                model, tokenizer, RAGGED[:1] * 3, space=space, values=same, max_new_tokens=8, temperature=2.0, **key
            )
        )

    first = run(seed=2**64 - 1, generation=5)
    assert first == run(seed=2**64 - 1, generation=5)
    assert first != run(seed=2**64 - 1, generation=6)
    assert first != run(seed=5, generation=5)
    assert len({str(tokens) for completions in first for tokens in completions}) == 12, "members and prompts differ"


def test_progress_and_mode(model, tokenizer, space, values):
    calls = []
    model.train()
    try:
        generate(
            model, tokenizer, EQUAL, space=space, values=values, max_new_tokens=2, row_budget=8,
            progress=lambda done, total: calls.append((done, total)),
        )  # fmt: skip
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert calls == [(8, 18), (16, 18), (18, 18)]


def test_the_end_token_is_the_tokenizers_where_the_model_names_none(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    (completions,) = generate(model, tokenizer, RAGGED, max_new_tokens=20).completions
    assert any(set(completion.token_ids) & set(ENDS[1:]) for completion in completions)
    for completion in completions:
        assert completion.finished == (completion.token_ids[-1] == 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts must be a list of at least one text"),
        ({"prompts": "3 4"}, "prompts must be a list"),
        ({"prompts": ["3", ""]}, "prompt 1: the tokenizer makes no token of ''"),
        ({"prompts": ["3", "4 " * 31]}, "prompt 1 has 31 tokens: with max_new_tokens=10 it exceeds .* context of 40"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"row_budget": 2.5}, "row_budget must be a whole number of at least 1, got 2.5"),
        ({"temperature": -1.0}, "temperature must be a finite number of at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"assignment": "each"}, "assignment must be 'all' or 'per_prompt', got 'each'"),
        ({"assignment": "per_prompt", "prompts": ["3"] * 4}, "multiples of the 4 prompts, got 6 members"),
        ({"space": None}, "got values without space"),
        ({"values": None}, "got space without values"),
        ({"values": torch.zeros(3)}, r"values must have shape \[members, \d+\], got \[3\]"),
    ],
)
def test_bad_input(model, tokenizer, space, values, changes, message):
    arguments = {"prompts": RAGGED, "space": space, "values": values, "max_new_tokens": 10, **changes}
    with pytest.raises(InputError, match=message):
        generate(model, tokenizer, arguments.pop("prompts"), **arguments)


def test_a_model_that_keeps_its_state_elsewhere_is_refused(tokenizer):
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, n_groups=1
    )
    model = Mamba2ForCausalLM(config)
    with pytest.raises(InputError, match="model must return past_key_values to be decoded, Mamba2ForCausalLM does not"):
        generate(model, tokenizer, EQUAL, max_new_tokens=3)


def test_another_models_tokenizer_is_refused(model):
    backend = Tokenizer(models.WordLevel({"<eos>": 1, "far": VOCABULARY}, unk_token="<eos>"))
    foreign = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    with pytest.raises(InputError, match="prompt 0 has token 32, the model's vocabulary has 32"):
        generate(model, foreign, ["far"], max_new_tokens=1)
