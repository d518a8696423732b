"""Members computed in one batch are the models their perturbed parameters make; the model is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from essa_kernels import NoiseKey, gaussian, rademacher
from essa_kernels.nn import POINT, FullWeights, LoRAFactors, LowRankNoise, Perturbed, SingularValues

from .conftest import LLAMA_LIKE, VOCABULARY, build, build_base

IDS = torch.tensor([[7, 3, 40, 12, 2], [30, 11, 4, 25, 9], [5, 5, 8, 41, 6]])
KEY = NoiseKey(2**64 - 3, generation=5)
SIGMA = 0.05
MAKE = {
    "svd": lambda model, **options: SingularValues(model, **options),
    "lora": lambda model, **options: LoRAFactors(model, **options),
    "lowrank": lambda model, **options: LowRankNoise(model, **options),
    "full": lambda model, **options: FullWeights(model, **options),
}


def model_for(name: str, family: str = "llama", dtype: torch.dtype = torch.float32):
    return build(family, dtype) if name in ("svd", "lora") else build_base(family, dtype)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def batched(space, model, members: range, sigma: float = SIGMA):
    """Logits [members, rows, ...] of all members in one batch, or one after another."""
    parts = [members] if space.batched else [range(m, m + 1) for m in members]
    found = []
    for part in parts:
        with torch.inference_mode(), space.attach(Perturbed(KEY, sigma, part)) as population:
            population.assign(torch.arange(len(part) + 1) * len(IDS))
            found.append(model(IDS.repeat(len(part), 1)).logits.clone())
    return torch.cat(found).unflatten(0, (len(members), len(IDS)))


def noise_of(space, position: int, member: int, distribution: str, rank: int = 1) -> torch.Tensor:
    """A parameter's noise, from the contract."""
    draw = {"gaussian": gaussian, "rademacher": rademacher}[distribution]
    shape = space.parameters[position].shape
    if space.name == "svd":
        return draw(shape, KEY, member)
    if space.name == "lora":
        factor, layer = divmod(position, len(space.names))
        return draw(shape, KEY.at(site=2 * layer + factor), member)
    if space.name == "full":
        return draw(shape, KEY.at(site=2 * position), member)
    sign = -1 if member % 2 else 1
    f_t = draw((rank, shape[1]), KEY.at(site=2 * position), member & ~1)
    e_t = draw((rank, shape[0]), KEY.at(site=2 * position + 1), member & ~1)
    return sign * e_t.T @ f_t / rank**0.5


@pytest.mark.parametrize(
    ("name", "family", "options"),
    [
        ("svd", "llama", {}),
        ("svd", "llama", {"alpha": 0.5, "offset_mode": "relative"}),
        ("lora", "llama", {}),
        ("lora", "gpt2", {"distribution": "rademacher"}),
        ("lowrank", "qwen3", {}),
        ("lowrank", "gpt2", {"rank": 3, "distribution": "rademacher"}),
        ("full", "gemma2", {}),
        ("full", "gpt2", {"distribution": "rademacher"}),
    ],
)
def test_a_member_is_the_model_its_parameters_make(name, family, options):
    model = model_for(name, family)
    space = MAKE[name](model, **options)
    together = batched(space, model, range(3, 7))
    assert not torch.equal(together[0], together[1])
    distribution, rank = options.get("distribution", "gaussian"), options.get("rank", 1)
    start = [parameter.clone() for parameter in space.parameters]
    for member, found in zip(range(3, 7), together, strict=True):
        for position, parameter in enumerate(space.parameters):
            parameter.copy_(start[position] + SIGMA * noise_of(space, position, member, distribution, rank))
        space.moved()
        alone = copy.deepcopy(model) if name in ("lowrank", "full") else model
        space.load_()
        torch.testing.assert_close(found, logits(alone), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batched(space, model, range(1), 0.0)[0], found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_added_is_what_the_members_were(name):
    model = model_for(name)
    space = MAKE[name](model)
    found = batched(space, model, range(4))
    for member in (0, 3):
        weights = [0.0] * 4
        weights[member] = SIGMA
        space.reset()
        space.add_noise_(space.parameters, KEY, weights)
        space.moved()
        torch.testing.assert_close(batched(space, model, range(1), 0.0)[0], found[member], rtol=1e-4, atol=1e-4)
    for weights in ([0.3, -0.2, 0.1, 0.25, -1.0], [0.0, 0.0, 0.5]):
        sums = [torch.zeros_like(parameter) for parameter in space.parameters]
        space.add_noise_(sums, KEY, weights)
        for position, total in enumerate(sums):
            noise = [noise_of(space, position, member, "gaussian").double() for member in range(len(weights))]
            expected = sum(weight * eps for weight, eps in zip(weights, noise, strict=True))
            torch.testing.assert_close(total, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_leaves_every_bit_of_the_model(name, dtype):
    model = model_for(name, dtype=dtype)
    space = MAKE[name](model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    anatomy = {key: dict(vars(module)) for key, module in model.named_modules()}
    expected = logits(model)
    for generation in range(3):
        batched(space, model, range(8 * generation, 8 * generation + 8), 0.3)
    with pytest.raises(KeyboardInterrupt), space.attach(Perturbed(KEY, SIGMA, range(1))):
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert {key: dict(vars(module)) for key, module in model.named_modules()} == anatomy
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["lora", "lowrank", "full"])
def test_steps_too_small_for_bfloat16_add_up_and_can_be_undone(name):
    model = model_for(name, dtype=torch.bfloat16)
    space = MAKE[name](model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    start = [parameter.clone() for parameter in space.parameters]
    assert all(parameter.dtype == torch.float32 for parameter in space.parameters)
    for _ in range(40):
        space.add_noise_(space.parameters, KEY, [1e-5])
        space.moved()
    for position, parameter in enumerate(space.parameters):
        moved = start[position] + 40e-5 * noise_of(space, position, 0, "gaussian")
        torch.testing.assert_close(parameter, moved, rtol=0, atol=5e-6)
    space.load_()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    space.reset()
    space.load_()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MAKE)
def test_what_is_saved_computes_the_same_in_plain_peft_and_transformers(name, tmp_path, tokenizer):
    model = model_for(name, "qwen2")
    base = build_base("qwen2")
    space = MAKE[name](model)
    space.add_noise_(space.parameters, KEY, [0.02, 0.0, 0.01])
    space.moved()
    folder = tmp_path / space.output
    for _ in range(2):  # the second takes the first one's place
        space.save(folder, tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == [space.output]
    if space.output == "adapter":
        plain = PeftModel.from_pretrained(base, str(folder))
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}
    torch.testing.assert_close(batched(space, model, range(1), 0.0)[0], logits(plain), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(plain), logits(model_for(name, "qwen2")))
    space.load_()
    assert torch.equal(logits(model), logits(plain))


def test_the_point_is_a_population_of_one():
    assert len(POINT) == 1 and POINT.sigma == 0
    members = Perturbed(KEY, SIGMA, range(10))
    assert members[3:5] == Perturbed(KEY, SIGMA, range(3, 5)) and len(members[8:20]) == 2


def test_float32_weights_that_are_not_perturbed_in_place_have_no_copy():
    model = build_base("llama")
    shared = LowRankNoise(model)
    layers = dict(model.named_modules())
    for name, parameter in zip(shared.names, shared.parameters, strict=True):
        assert parameter.data_ptr() == layers[name].weight.data_ptr()
    assert "lm_head" not in shared.names
    own = {weight.data_ptr() for weight in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in FullWeights(model).parameters}


def test_tied_weights_are_one():
    model = build_base("gpt2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    names = FullWeights(model).names
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    assert names == sorted(names)


@pytest.mark.parametrize("name", ["lowrank", "full"])
def test_what_text_does_not_go_through_is_left_as_it_is(name):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "gemma3",
        text_config={"vocab_size": VOCABULARY, **LLAMA_LIKE},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(config)
    space = MAKE[name](model)
    assert space.names and all(".language_model." in layer for layer in space.names)
    assert any("vision" in layer for layer, _ in model.named_parameters())


def test_routers_are_left_as_they_are():
    """Llama 4's is a linear layer by inheritance, and returns a choice of experts too."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 48}
    config = AutoConfig.for_model("llama4_text", vocab_size=VOCABULARY, pad_token_id=0, **LLAMA_LIKE, **experts)
    model = AutoModelForCausalLM.from_config(config).eval()
    space = LowRankNoise(model)
    assert not any("router" in name for name in space.names) and any("shared_expert" in name for name in space.names)
    both = batched(space, model, range(2))
    torch.testing.assert_close(both[0], batched(space, model, range(1))[0])
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_linear_layers_that_share_a_weight_are_refused():
    model = build_base("llama")
    layer = model.model.layers[0].self_attn
    layer.v_proj.weight = layer.k_proj.weight
    with pytest.raises(ValueError, match=r"layers.0.self_attn.k_proj and .*v_proj share a weight"):
        LowRankNoise(model)


@pytest.mark.parametrize("name", ["lora", "lowrank"])
def test_members_under_autocast_are_near_those_without(name):
    model = model_for(name)
    space = MAKE[name](model)
    expected = batched(space, model, range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = batched(space, model, range(3))
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.1)
    assert (got[0].float() - got[1]).abs().max() > 1e-3


class Quantised(nn.Linear):
    """A linear layer whose weight is made of whole numbers."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("name", ["lowrank", "full"])
def test_weights_that_cannot_be_searched_are_refused(name):
    with pytest.raises(ValueError, match=r"must carry no adapter, PeftModel has 'default'; merge it first"):
        MAKE[name](build("llama"))
    with pytest.raises(ValueError, match=r"must be a plain floating-point tensor, got torch.int8"):
        MAKE[name](nn.Sequential(Quantised()))


def test_attaching_is_refused_by_name():
    model = build_base("llama")
    full, low_rank = FullWeights(model), LowRankNoise(model)
    with pytest.raises(ValueError, match="one member at a time, got 2"), full.attach(Perturbed(KEY, SIGMA, range(2))):
        pass
    with full.attach(POINT), pytest.raises(RuntimeError, match="attached already"), full.attach(POINT):
        pass
    members = Perturbed(KEY, SIGMA, range(2))
    with low_rank.attach(members):
        with pytest.raises(RuntimeError, match="attached already"), low_rank.attach(members):
            pass
        with pytest.raises(RuntimeError, match="has been replaced already"), LowRankNoise(model).attach(members):
            pass
    with pytest.raises(ValueError, match="no linear layer"):
        LowRankNoise(nn.Sequential(nn.Embedding(3, 2)))
    space = SingularValues(build("llama"))
    with pytest.raises(ValueError, match=r"offsets must have shape \[members, \d+\]"), space.attach(torch.zeros(2, 3)):
        pass
    with pytest.raises(ValueError, match="offset_mode must be one of absolute, relative, got 'both'"):
        SingularValues(build("llama"), offset_mode="both")
