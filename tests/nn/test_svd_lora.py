"""The coordinates, the adapter that comes out of them, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from essa_kernels.nn import SVDLoRA, adapter_folder
from essa_kernels.nn.factors import Factors

from .conftest import SEVEN, build, build_base, perturbed, randomise

IDS = torch.tensor([[7, 3, 40, 12], [30, 11, 4, 25]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def adapter_weights(model):
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.clone() for name, weight in weights.items()}


@pytest.fixture
def model():
    return build("llama")


@given(r=st.integers(1, 12), d_in=st.integers(1, 20), d_out=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_factors_are_economical_signed_and_recompose(r, d_in, d_out, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator)
    factors = Factors.decompose(a, b)
    assert len(factors.s_a) == min(r, d_in) and len(factors.s_b) == min(r, d_out)
    for spectrum in (factors.s_a, factors.s_b):
        assert (spectrum >= 0).all() and (spectrum.diff() <= 0).all()
    torch.testing.assert_close(factors.core, factors.v_b @ factors.u_a)
    for u in (factors.u_a, factors.v_b.mT):
        assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()
    again_a, again_b = factors.compose(factors.s_a, factors.s_b)
    torch.testing.assert_close(again_a, a.double(), rtol=0, atol=1e-6 * (1 + a.abs().max().item()))
    torch.testing.assert_close(again_b, b.double(), rtol=0, atol=1e-6 * (1 + b.abs().max().item()))


def test_coordinates_go_by_sorted_name_then_a_then_b(model):
    space = SVDLoRA.from_peft(model)
    assert space.names == sorted(f"model.layers.{i}.{part}" for i in range(2) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ))  # fmt: skip
    expected = []
    for name in space.names:
        layer = model.get_submodule(f"base_model.model.{name}")
        for factor in (layer.lora_A, layer.lora_B):
            expected.append(torch.linalg.svdvals(factor["default"].weight.detach().double()).float())
    assert space.size == len(torch.cat(expected)) == 14 * 2 * 4
    assert space.spectrum.dtype == torch.float32 and space.spectrum.device.type == "cpu"
    torch.testing.assert_close(space.spectrum, torch.cat(expected))


@pytest.mark.parametrize("alpha", [1e-6, 0.25, 0.3, 0.5, 0.75, 1.0, 1])
def test_top_takes_the_largest_of_each_factor(model, alpha):
    space = SVDLoRA.from_peft(model)
    expected = [start + i for start in range(0, space.size, 4) for i in range(max(1, math.ceil(alpha * 4)))]
    assert space.top(alpha).tolist() == expected and space.top(alpha).dtype == torch.int64


def test_top_of_a_whole_number_is_that_number():
    space = SVDLoRA.from_peft(build("llama", r=10))
    assert len(space.top(0.7)) == 7 * 28, "0.7 * 10 is 7.000000000000001 in floating point"


@pytest.mark.parametrize("alpha", [0, -0.1, 1.01, math.nan])
def test_top_refuses_alpha_out_of_range(model, alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\]"):
        SVDLoRA.from_peft(model).top(alpha)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"k_proj": 32}},
        {"r": 64},
        {"lora_dropout": 0.5},
        {"target_modules": ["q_proj", "lm_head"]},
        {"layers_to_transform": [1]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_saved_member_is_the_member(tmp_path, options):
    model = build("llama", **options)
    space = SVDLoRA.from_peft(model)
    member = perturbed(space, 1)[0]
    with torch.no_grad(), space.attach(member[None]) as population:
        population.assign(torch.tensor([0, len(IDS)]))
        expected = logits(model)
    space.save_adapter(member, tmp_path / "adapter")

    loaded = PeftModel.from_pretrained(build_base("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    original, saved = adapter_weights(model), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: (w.shape, w.dtype) for name, w in saved.items()} == {
        name: (w.shape, w.dtype) for name, w in original.items()
    }
    space.load_(member)
    assert all(torch.equal(weight, saved[name]) for name, weight in adapter_weights(model).items())


def test_the_spectrum_is_the_adapter_itself(model):
    before = adapter_weights(model)
    space = SVDLoRA.from_peft(model)
    for name, weight in space.state(space.spectrum).items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


def test_an_adapter_of_half_precision_stays_so(tmp_path):
    model = get_peft_model(
        build_base("llama", torch.bfloat16), LoraConfig(r=4, target_modules=SEVEN), autocast_adapter_dtype=False
    )
    randomise(model)
    space = SVDLoRA.from_peft(model)
    assert {weight.dtype for weight in space.state(space.spectrum).values()} == {torch.bfloat16}


def test_saving_twice_gives_the_same_bytes_and_replaces(model, tmp_path):
    space = SVDLoRA.from_peft(model)
    first, second = perturbed(space, 2)
    space.save_adapter(first, tmp_path / "a")
    space.save_adapter(second, tmp_path / "b")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    space.save_adapter(first, tmp_path / "b")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_an_adapter_takes_the_place_of_another_whole(model, tmp_path, monkeypatch, in_one_step):
    def content():
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def exchange(new, old):
        seen.append(content())
        original(new, old)
        seen.append(content())

    original, seen, folder = adapter_folder._exchange, [], tmp_path / "adapter"
    monkeypatch.setattr(adapter_folder, "_exchange", exchange)
    if not in_one_step:
        monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    first, second = perturbed(SVDLoRA.from_peft(model), 2)
    SVDLoRA.from_peft(model).save_adapter(first, folder)
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    before = content()
    model.peft_config["default"].revision = "another"
    SVDLoRA.from_peft(model).save_adapter(second, folder)
    assert seen == [before, content()]
    assert {name for name in before if before[name] != content()[name]} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert content()["mine.txt"] == b"mine" and [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_failed_save_leaves_the_old_adapter(model, tmp_path, monkeypatch):
    space = SVDLoRA.from_peft(model)
    first, second = perturbed(space, 2)
    space.save_adapter(first, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()

    def half_written(tensors, path, **options):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half_written)
    for folder in ("a", "new"):
        with pytest.raises(OSError, match="disk full"):
            space.save_adapter(second, tmp_path / folder)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(FileExistsError, match="is a file"):
        space.save_adapter(first, tmp_path / "a" / "adapter_config.json")


def test_a_transformers_model_with_an_injected_adapter(model, tmp_path):
    injected = build_base("llama")
    injected.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=SEVEN))
    for name, weight in adapter_weights(model).items():
        layer, part, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        getattr(injected.get_submodule(layer), part)["default"].weight.data.copy_(weight)
    space, peft_space = SVDLoRA.from_peft(injected), SVDLoRA.from_peft(model)
    assert space.names == peft_space.names and torch.equal(space.spectrum, peft_space.spectrum)
    space.save_adapter(space.spectrum, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(build_base("llama"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_bias": True, "target_modules": ["c_attn"]}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] is not supported"),
        ({"target_modules": ["wte", "c_attn"]}, "transformer.wte: LoRA on an embedding is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_cannot_be_honoured_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        SVDLoRA.from_peft(build("gpt2", **options))


def test_other_kinds_of_layer_are_refused_by_name():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv1d(3, 4, 2)
            self.experts = torch.nn.ModuleList([torch.nn.Linear(3, 4)])

    with pytest.raises(ValueError, match="conv: LoRA on a Conv1d is not supported"):
        SVDLoRA.from_peft(get_peft_model(Net(), LoraConfig(target_modules=["conv"])))
    with pytest.raises(ValueError, match=r"experts\.0: LoRA on routed experts is not supported"):
        SVDLoRA.from_peft(get_peft_model(Net(), LoraConfig(target_modules=["experts.0"])))


def test_no_adapter_or_another_one_is_refused(model):
    from peft import IA3Config

    with pytest.raises(ValueError, match=r"must carry a PEFT LoRA adapter.*get_peft_model.*essa sft"):
        SVDLoRA.from_peft(build_base("llama"))
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'mine'"):
        SVDLoRA.from_peft(model, "mine")
    other = get_peft_model(build_base("llama"), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="must be a LoRA, got IA3"):
        SVDLoRA.from_peft(other)


def test_only_the_one_active_unmerged_adapter_is_searched(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"only active adapter must be 'default', active are \['default', 'second'\]"):
        SVDLoRA.from_peft(model)
    model.set_adapter("second")
    with pytest.raises(ValueError, match=r"set_adapter\('default'\)"):
        SVDLoRA.from_peft(model)
    model.set_adapter("default")
    space = SVDLoRA.from_peft(model)
    assert len(space.names) == 14 and len(SVDLoRA.from_peft(build("llama", target_modules=["q_proj"])).names) == 2

    model.merge_adapter()
    for use in (lambda: SVDLoRA.from_peft(model), lambda: space.attach(space.spectrum[None]).__enter__()):
        with pytest.raises(ValueError, match="merged into the base weight"):
            use()
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters are disabled"):
        SVDLoRA.from_peft(model)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_never_trained_is_refused(model, part):
    factors = [parameter for name, parameter in model.named_parameters() if part in name]
    for factor in factors[:-1]:
        factor.data.zero_()
    SVDLoRA.from_peft(model)
    factors[-1].data.zero_()
    with pytest.raises(ValueError, match=f"adapter 'default': {part} is zero in every layer"):
        SVDLoRA.from_peft(model)


def test_a_broken_adapter_is_refused(model):
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").lora_B["default"].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: lora_B holds NaN or infinity"):
        SVDLoRA.from_peft(model)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda size: torch.zeros(2, size + 1), r"values must have shape \[members, size\] with size = 112"),
        (lambda size: torch.zeros(size), r"got \[112\]"),
        (lambda size: torch.zeros(0, size), r"got \[0, 112\]"),
        (lambda size: torch.zeros(2, size, dtype=torch.int64), "floating-point"),
        (lambda size: [0.0] * size, "floating-point"),
        (lambda size: torch.full((2, size), math.inf), "finite"),
    ],
)
def test_values_are_checked(model, values, message):
    space = SVDLoRA.from_peft(model)
    with pytest.raises(ValueError, match=message), space.attach(values(space.size)):
        pass
