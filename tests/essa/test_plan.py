"""The plan's arithmetic, on numbers worked out by hand, and against the models themselves."""

from __future__ import annotations

import json

import pytest
import torch
from essa import measure
from essa.cli import app
from essa.config import InputError
from essa.demo.warm_start import BASE_MODEL
from essa.measure import prompt_of
from essa.models import load_adapter, load_base
from essa.plan import (
    GIB,
    Job,
    Overheads,
    Rates,
    Shape,
    between,
    generation_seconds,
    largest_row_budget,
    rates_of_gpu,
    row_bytes,
    scaling,
    weight_bytes,
)
from essa.quantization import weight_bytes as loaded_bytes
from essa.rollout import generate
from transformers import AutoConfig
from typer.testing import CliRunner

from essa_kernels.nn import SVDLoRA


def qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int):
    return AutoConfig.for_model(
        "qwen2",
        vocab_size=152064,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )


QWEN_7B, QWEN_32B = qwen(3584, 18944, 28, 28, 4), qwen(5120, 27648, 64, 40, 8)
JOB = Job(members=96, prompts=64, prompt_tokens=256, new_tokens=256)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "must be a decoder-only language model, got t5"),
        ("vit", "must be a causal language model, got vit"),
    ],
)
def test_a_model_of_another_kind_is_named(tmp_path, kind, message):
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", "--model_name_or_path", str(tmp_path)])
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("quantization", "dtype"), [("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16")]
)
def test_weights_take_what_the_loaded_model_takes(quantization, dtype):
    if quantization != "none":
        pytest.importorskip("torchao")
    model, _ = load_base(str(BASE_MODEL), dtype=dtype, quantization=quantization)
    planned = weight_bytes(Shape.of(model.config), Job(1, 1, 1, 1, dtype, quantization))
    # The norms, the biases and int8's scales are left out: little, except in a model this small.
    assert planned == pytest.approx(loaded_bytes(model), rel=0.06)


def test_the_shape_of_a_7b_model():
    shape = Shape.of(QWEN_7B)
    attention = 3584 * 3584 * 2 + 2 * 3584 * 512
    assert shape.linear == 28 * (attention + 3 * 3584 * 18944)
    assert shape.head == shape.embedding == 152064 * 3584
    assert shape.kv == 2 * 28 * 4 * 128
    assert weight_bytes(shape, JOB) == pytest.approx(7.61e9 * 2, rel=0.001)
    assert row_bytes(shape, JOB) == (28 * 2 * 512 * 512 * 2 + 256 * (4 * 3584 + 3 * 18944) * 2 + 152064 * 6)


def test_attention_counts_where_prompts_are_long():
    """Products with keys and values: 4 x queries x tokens attended to, and half the prompt for a prompt's tokens."""
    shape = Shape.of(QWEN_7B)
    assert shape.queries == 28 * 3584
    assert shape.attention_flops(1000) == 4 * 28 * 3584 * 1000
    reached = 989e12 * 0.45
    for tokens, share in ((256, 0.004), (32768, 0.5)):
        job = Job(8, 8, tokens, 256)
        products = (shape.flops * tokens * 8 + 2 * shape.head * 8) / reached + 28 * 30e-6
        attention = 8 * 2 * 28 * 3584 * tokens**2 / reached
        prefill = rates_of_gpu(shape, job, 8, "h100").prefill
        assert prefill == pytest.approx(products + attention, rel=1e-9)
        assert attention / products == pytest.approx(share, rel=0.1)


def test_the_largest_chunk_fits_and_one_more_row_does_not():
    shape = Shape.of(QWEN_7B)
    rows = largest_row_budget(shape, JOB, 80 * GIB)
    for count, fits in ((rows, True), (rows + 1, False)):
        assert (weight_bytes(shape, JOB) + count * row_bytes(shape, JOB) <= 0.9 * 80 * GIB) == fits
    assert largest_row_budget(shape, Job(2, 3, 8, 8), 80 * GIB) == 6, "there are no more rows than that"
    with pytest.raises(InputError, match=r"the model needs 15.8 GiB for one sequence, got 12.0 GiB"):
        largest_row_budget(shape, JOB, 12 * GIB)


def test_seconds_of_a_generation():
    job, rates = Job(members=10, prompts=8, prompt_tokens=5, new_tokens=11), Rates(prefill=2.0, step=0.1)
    assert rates.chunk(job) == pytest.approx(3.0)
    free, dear = Overheads(0.0, 0.0), Overheads(driver=0.5, message=0.25)
    # 80 rows in chunks of 15: 6 chunks, which 4 workers do in 2 rounds and 6 or 100 workers in one.
    for workers, rounds in ((1, 6), (2, 3), (3, 2), (4, 2), (6, 1), (100, 1)):
        assert generation_seconds(job, rates, 15, workers, free) == pytest.approx(3.0 * rounds)
    assert generation_seconds(job, rates, 15, 4, dear) == pytest.approx(6.0 + 0.5 + 4 * 0.25)
    assert generation_seconds(job, rates, 15, 100, dear) == pytest.approx(3.0 + 0.5 + 6 * 0.25)


def test_scaling_ends_where_the_work_does():
    shape = Shape.of(QWEN_7B)
    fixed = scaling(JOB, lambda rows: rates_of_gpu(shape, JOB, rows, "h100"), lambda workers: 96, most=1024)
    assert [line["workers"] for line in fixed] == [2**power for power in range(11)]
    efficiency = {line["workers"]: line["efficiency"] for line in fixed}
    assert efficiency[1] == 1.0 and efficiency[64] > 0.95, "64 chunks: as many workers do them in one round"
    assert efficiency[128] < 0.51, "half of these have nothing to do"
    seconds = [line["seconds"] for line in fixed]
    assert seconds == sorted(seconds, reverse=True) or seconds[6] == min(seconds)


def test_the_papers_scaling():
    """ESSA's lead over GRPO on a 32 B model grows from 2x on 16 GPUs to 6x on 128 (arXiv 2507.04453): so it gains more
    than 3x from them, however little GRPO does."""
    shape, job = Shape.of(QWEN_32B), Job(members=96, prompts=100, prompt_tokens=256, new_tokens=1024)
    most = largest_row_budget(shape, job, 80 * GIB)
    table = scaling(
        job, lambda rows: rates_of_gpu(shape, job, rows, "h100"), lambda workers: min(most, job.rows // workers)
    )
    seconds = {line["workers"]: line["seconds"] for line in table}
    assert 3.0 < seconds[16] / seconds[128] <= 8.0
    assert seconds[1] / seconds[16] > 15.5, "far from the last chunk it is almost linear"
    assert seconds[512] / seconds[1024] < 1.3, "and ends where a step reads the weights for a few sequences"


def test_rates_given(tmp_path):
    QWEN_7B.save_pretrained(tmp_path)
    arguments = ["plan", "--model_name_or_path", str(tmp_path), "--gpus", "8", "--row_budget", "96"]
    rates = ["--prefill_tokens_per_second", "9600", "--decode_step_seconds", "0.05"]
    result = CliRunner().invoke(app, [*arguments, *rates])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers["chunk_seconds"] == pytest.approx(96 * 256 / 9600 + 255 * 0.05)
    assert numbers["prefill_tokens_per_second"] == pytest.approx(9600) and numbers["decode_step_seconds"] == 0.05
    assert numbers["generation_seconds"] == pytest.approx(8 * numbers["chunk_seconds"], rel=0.01)
    for wrong, message in (
        (rates[:2], "must be given together"),
        ([*rates[:3], "0"], "decode_step_seconds must be a positive number, got 0"),
        ([*rates, "--gpu", "measure"], "gpu 'measure' measures the rates"),
    ):
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2 and message in result.stderr


def test_rates_between_measurements():
    rates = between((4, Rates(1.0, 0.1)), (12, Rates(3.0, 0.2)))
    assert rates(8) == Rates(2.0, pytest.approx(0.15))
    assert rates(20) == Rates(5.0, pytest.approx(0.3)) and rates(1) == Rates(1.0, 0.1)


def test_experts_count_and_compute_in_part(tmp_path):
    """Qwen3-30B-A3B: 30.5 billion parameters, of which a token takes 3.3 (its model card)."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    )
    shape = Shape.of(config)
    assert shape.experts == 48 * 128 * 3 * 2048 * 768 and shape.active == 8 / 128
    assert shape.parameters == pytest.approx(30.5e9, rel=0.002)
    assert shape.flops / 2 + shape.head + shape.embedding == pytest.approx(3.3e9, rel=0.02)
    assert weight_bytes(shape, JOB) == 2 * shape.parameters
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", "--model_name_or_path", str(tmp_path), "--quantization", "int8"])
    assert result.exit_code == 2 and "the experts of a qwen3_moe cannot be quantised" in result.stderr


def test_the_command(tmp_path):
    QWEN_7B.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["plan", "--model_name_or_path", str(tmp_path), "--gpus", "16"])
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers["parameters"] == pytest.approx(7.615e9, rel=0.001)
    assert numbers["row_budget"] == 96 * 64 // 16 and numbers["chunks"] == 16
    assert 0 < numbers["memory_per_worker_gib"] < 0.9 * 80
    spread = CliRunner().invoke(
        app,
        ["plan", "--model_name_or_path", str(tmp_path), "--gpus", "16", "--gpus_per_worker", "4", "--memory", "10"],
    )
    assert spread.exit_code == 0, spread.output
    numbers = json.loads(spread.stdout)
    assert numbers["workers"] == 4 and numbers["gpus_per_worker"] == 4
    assert 10 < numbers["memory_per_worker_gib"] < 0.9 * 40
    for arguments, message in (
        (["--gpu", "h1000"], "gpu must be one of a100, h100, h200, l4, measure, got 'h1000'"),
        (["--memory", "10"], "memory: the model needs 15.8 GiB"),
        (["--row_budget", "100000"], "row_budget: "),
        (["--row_budget", "0"], "row_budget must be at least 1, got 0"),
        (["--memory", "nan"], "memory must be a positive number of GiB, got nan"),
        (["--gpus_per_worker", "2"], "gpus must be a multiple of gpus_per_worker, 2, got 1"),
        (
            ["--gpus", "2", "--gpus_per_worker", "2", "--gpu", "measure"],
            "gpus_per_worker must be 1 with gpu 'measure', got 2",
        ),
        (["--model_name_or_path", str(tmp_path / "no")], "cannot be read"),
        (["--prompt_tokens", "200000"], "must fit into the model's context of 32768 tokens, got 200000 and 256"),
        (["--prompt_tokens", "32768", "--max_new_tokens", "2"], "must fit into the model's context"),
        (["--quantization", "int4", "--dtype", "float16"], "int4' computes in bfloat16: dtype must be"),
        (["--adapter", "mine"], "adapter must not be given with gpu 'h100'"),
    ):
        result = CliRunner().invoke(app, ["plan", "--model_name_or_path", str(tmp_path), *arguments])
        assert result.exit_code == 2 and message in result.stderr


MEASURE = ["plan", "--model_name_or_path", str(BASE_MODEL), "--gpu", "measure", "--dtype", "float32"]
MEASURE += ["--prompt_tokens", "8", "--max_new_tokens", "8", "--population_size", "4", "--prompts_per_generation", "3"]


def test_rates_are_measured_as_a_worker_runs(monkeypatch):
    """With its threads, a LoRA whose spectrum the members share out, prompts and members as in a chunk, and no early end."""
    seen = []

    def watched(model, tokenizer, prompts, **settings):
        rollout = generate(model, tokenizer, prompts, **settings)
        seen.append((torch.get_num_threads(), len(settings["values"]), settings["rows"], rollout.tokens))
        assert settings["space"].spectrum.any()
        assert {len(ids) for ids in tokenizer(prompts)["input_ids"]} == {8} and len(prompts) == 3
        assert rollout.tokens == len(settings["rows"]) * settings["max_new_tokens"]
        return rollout

    monkeypatch.setattr(measure, "generate", watched)
    before = torch.get_num_threads()
    result = CliRunner().invoke(app, [*MEASURE, "--gpus", "2", "--threads_per_worker", "3"])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == before
    numbers = json.loads(result.stdout)
    assert numbers["generation_seconds"] > 0 and numbers["row_budget"] == 6
    assert {(threads, members, rows) for threads, members, rows, _ in seen} == {(3, 1, range(1)), (3, 2, range(6))}


def test_a_worker_is_measured_on_one_thread_and_with_the_users_adapter(monkeypatch, warm_start):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    spectra = []
    monkeypatch.setattr(measure, "measure_rates", lambda *a, space, **k: spectra.append(space.spectrum) or Rates(1, 1))
    result = CliRunner().invoke(app, [*MEASURE, "--adapter", str(warm_start)])
    assert result.exit_code == 0, result.output
    assert threads[0] == 1
    assert torch.equal(
        spectra[0], SVDLoRA.from_peft(load_adapter(load_base(str(BASE_MODEL))[0], str(warm_start))).spectrum
    )


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_a_prompt_of_so_many_tokens(tokens, tokenizer):
    assert len(tokenizer(prompt_of(tokenizer, tokens))["input_ids"]) == tokens
