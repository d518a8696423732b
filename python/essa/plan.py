"""`essa plan`: what a generation will take on how many workers, on paper.

All the arithmetic is here. Memory comes from the model's configuration; seconds come from two rates of one worker: how long
the prompts of a chunk take, and one step of decoding it. They are given, measured (`essa.measure`), or derived from a GPU's
data sheet.

    rows        = members x prompts                      every member answers every prompt
    chunks      = ceil(rows / row_budget)
    chunk       = prefill + (new tokens - 1) x step
    generation  = ceil(chunks / workers) x chunk + driver + workers x message
    efficiency  = generation(1) / (workers x generation(workers))

So scaling ends where chunks do: the last round of chunks leaves workers idle unless their number divides the chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from essa.config import InputError
from essa.hub import offline_note, reach_hub
from essa_kernels.nn import of_routed_experts

BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# int8: one bfloat16 scale a row; int4: a scale and a zero point for each group of 32 weights.
QUANTISED_BYTES = {"int8": 1.0, "int4": 0.5 + 2 * 2 / 32}
GIB = 2**30

# Dense bfloat16 FLOP/s, bytes/s and bytes of memory from the makers' data sheets.
GPUS = {
    "a100": (312e12, 2.0e12, 80 * GIB),
    "h100": (989e12, 3.35e12, 80 * GIB),
    "h200": (989e12, 4.8e12, 141 * GIB),
    "l4": (121e12, 0.3e12, 24 * GIB),
}
FLOPS_REACHED, BANDWIDTH_REACHED = 0.45, 0.7
"""What large products, and reading the weights, reach of a data sheet's numbers in practice."""
STEP_OVERHEAD = 30e-6
"""Seconds a layer's launches take in a step of decoding, however little they compute."""
MEMORY_USED = 0.9
"""Part of a GPU's memory that a plan fills."""


@dataclass(frozen=True)
class Shape:
    """What a model's configuration says.

    Attributes:
        linear, head, embedding: parameters of the linear layers, of the output head, and of the input embedding (0 where
            it is the head's).
        experts: parameters of routed experts, which are not linear layers and stay as they are when those are quantised.
        active: the part of the experts that a token is routed to; all of them where the configuration does not say.
        layers, hidden, intermediate, vocabulary: sizes.
        kv: elements that one token adds to the KV cache.
        queries: elements of a token's queries in all layers. Every layer is taken to attend to all that precedes.
    """

    linear: int
    head: int
    embedding: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv: int
    queries: int
    experts: int = 0
    active: float = 1.0

    @property
    def parameters(self) -> int:
        return self.linear + self.experts + self.head + self.embedding

    @property
    def flops(self) -> float:
        """Of a token in all layers, without attention."""
        return 2.0 * (self.linear + self.active * self.experts)

    def attention_flops(self, tokens: float) -> float:
        """Of a token that attends to so many: a product with each of their keys and each of their values."""
        return 4.0 * self.queries * tokens

    @classmethod
    def of(cls, config: Any, trust_remote_code: bool = False) -> Shape:
        """From a transformers configuration; the model is built without memory for its weights."""
        from transformers import AutoModelForCausalLM
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        linears = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
        experts = [weight for name, weight in model.named_parameters() if of_routed_experts(name) and weight.dim() == 3]
        text = config.get_text_config()
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            linear=sum(linear.weight.numel() for linear in linears),
            head=head.weight.numel(),
            embedding=0 if embedding.weight is head.weight else embedding.weight.numel(),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocabulary=head.weight.shape[0],
            kv=2 * text.num_hidden_layers * kv_heads * head_size,
            queries=text.num_hidden_layers * heads * head_size,
            experts=sum(weight.numel() for weight in experts),
            active=min(1.0, (getattr(text, "num_experts_per_tok", None) or math.inf) / len(experts[0]))
            if experts
            else 1.0,
        )


@dataclass(frozen=True)
class Job:
    """What is to be done in a generation.

    Attributes:
        members, prompts: every member answers every prompt.
        prompt_tokens, new_tokens: the longest prompt and completion.
        dtype, quantization: as in `ESSAConfig`.
    """

    members: int
    prompts: int
    prompt_tokens: int
    new_tokens: int
    dtype: str = "bfloat16"
    quantization: str = "none"

    @property
    def rows(self) -> int:
        return self.members * self.prompts


def weight_bytes(shape: Shape, job: Job) -> float:
    """Bytes of the base model."""
    linear = QUANTISED_BYTES.get(job.quantization, BYTES[job.dtype])
    return shape.linear * linear + (shape.experts + shape.head + shape.embedding) * BYTES[job.dtype]


def row_bytes(shape: Shape, job: Job) -> float:
    """Bytes of one sequence: its KV cache when it is complete, and its share of a forward pass over the prompts.

    At their most those hold, for each token, the stream and three tensors as wide as the MLP, and for each row the
    logits of the last token, in float32 too.
    """
    size = BYTES[job.dtype]
    cache = shape.kv * (job.prompt_tokens + job.new_tokens) * size
    activations = job.prompt_tokens * (4 * shape.hidden + 3 * shape.intermediate) * size
    return cache + activations + shape.vocabulary * (size + 4.0)


def largest_row_budget(shape: Shape, job: Job, memory: float) -> int:
    """The most sequences to a chunk, at most all of a generation's. Raises InputError if not even one fits."""
    rows = int((memory * MEMORY_USED - weight_bytes(shape, job)) // row_bytes(shape, job))
    if rows < 1:
        needed = (weight_bytes(shape, job) + row_bytes(shape, job)) / MEMORY_USED
        raise InputError(f"memory: the model needs {needed / GIB:.1f} GiB for one sequence, got {memory / GIB:.1f} GiB")
    return min(rows, job.rows)


@dataclass(frozen=True)
class Rates:
    """Seconds that one worker takes for the prompts of a full chunk, and for one step of decoding it."""

    prefill: float
    step: float

    def chunk(self, job: Job) -> float:
        """Seconds of a chunk whose completions all have their full length."""
        return self.prefill + (job.new_tokens - 1) * self.step


def rates_of_gpu(shape: Shape, job: Job, row_budget: int, gpu: str) -> Rates:
    """From a data sheet: prompts are bound by arithmetic, steps by reading weights and cache or by arithmetic."""
    flops, bandwidth, _ = GPUS[gpu]
    flops, bandwidth = flops * FLOPS_REACHED, bandwidth * BANDWIDTH_REACHED
    head = 2.0 * shape.head * row_budget
    cache = shape.kv * (job.prompt_tokens + job.new_tokens / 2) * BYTES[job.dtype] * row_budget
    # A prompt's tokens attend to half of it on average.
    of_prompt_token = shape.flops + shape.attention_flops(job.prompt_tokens / 2)
    of_new_token = shape.flops + shape.attention_flops(job.prompt_tokens + job.new_tokens / 2)
    prefill = (of_prompt_token * job.prompt_tokens * row_budget + head) / flops
    reading = (weight_bytes(shape, job) + cache) / bandwidth
    step = max(reading, (of_new_token * row_budget + head) / flops) + shape.layers * STEP_OVERHEAD
    return Rates(prefill + shape.layers * STEP_OVERHEAD, step)


def rates_given(job: Job, prefill_tokens_per_second: float, decode_step_seconds: float, row_budget: int) -> Rates:
    """From numbers of the user's: prompts take as long as they have tokens, a step as long for any number of sequences."""
    return Rates(row_budget * job.prompt_tokens / prefill_tokens_per_second, decode_step_seconds)


@dataclass(frozen=True)
class Overheads:
    """What the driver adds: seconds of its own for a generation, and seconds for each worker it talks to."""

    driver: float = 0.02
    message: float = 0.001


OVERHEADS = Overheads()


def generation_seconds(
    job: Job,
    rates: Rates,
    row_budget: int,
    workers: int,
    overheads: Overheads = OVERHEADS,
) -> float:
    """Seconds of a generation on so many workers."""
    rounds = math.ceil(math.ceil(job.rows / row_budget) / workers)
    return (
        rounds * rates.chunk(job)
        + overheads.driver
        + min(workers, math.ceil(job.rows / row_budget)) * overheads.message
    )


def scaling(
    job: Job, rates: Callable[[int], Rates], row_budget: Callable[[int], int], most: int = 1024
) -> list[dict[str, float]]:
    """Seconds of a generation and efficiency on 1, 2, 4, ... workers.

    Args:
        rates: those of a worker with chunks of so many sequences.
        row_budget: that of a run on so many workers.
    """
    table: list[dict[str, float]] = []
    for workers in (2**power for power in range(most.bit_length())):
        rows = row_budget(workers)
        seconds = generation_seconds(job, rates(rows), rows, workers)
        alone = table[0]["seconds"] if table else seconds
        line = {"workers": workers, "row_budget": rows, "seconds": seconds, "efficiency": alone / (workers * seconds)}
        table.append(line)
    return table


def between(few: tuple[int, Rates], many: tuple[int, Rates]) -> Callable[[int], Rates]:
    """Rates for any number of sequences, on the straight line through two that were measured, and never below the first."""

    def at(rows: int) -> Rates:
        part = max(0.0, (rows - few[0]) / max(1, many[0] - few[0]))
        prefill, step = (
            low + part * max(0.0, high - low)
            for low, high in ((few[1].prefill, many[1].prefill), (few[1].step, many[1].step))
        )
        return Rates(prefill, step)

    return at


def plan(
    name: str,
    *,
    gpus: int,
    gpus_per_worker: int,
    gpu: str,
    memory: float | None,
    members: int,
    prompts: int,
    prompt_tokens: int,
    new_tokens: int,
    row_budget: int | None,
    dtype: str,
    quantization: str,
    prefill_tokens_per_second: float | None = None,
    decode_step_seconds: float | None = None,
    adapter: str | None = None,
    threads_per_worker: int = 1,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """What `essa plan` prints.

    Args:
        name: folder or hub name of the model.
        gpus: to plan for, in all.
        gpus_per_worker: that the layers of a worker's model are spread over, evenly. They add up their memory; each works
            while the others wait.
        gpu: one of `GPUS`, or "measure": this machine's rates, on the model itself.
        memory: GiB of a GPU; None for the data sheet's.
        row_budget: sequences to a chunk; None: a worker's share of a generation, or as many as fit.
        prefill_tokens_per_second, decode_step_seconds: rates of a worker with a full chunk, both or neither.
        adapter, threads_per_worker: of a worker that is measured.

    Raises:
        InputError: an argument cannot be used, or the model does not fit.
    """
    from transformers import AutoConfig

    from essa.models import context_of
    from essa.quantization import check_dtype

    if row_budget is not None and row_budget < 1:
        raise InputError(f"row_budget must be at least 1, got {row_budget}")
    if gpus % gpus_per_worker:
        raise InputError(f"gpus must be a multiple of gpus_per_worker, {gpus_per_worker}, got {gpus}")
    if gpu == "measure" and gpus_per_worker > 1:
        raise InputError(f"gpus_per_worker must be 1 with gpu 'measure', got {gpus_per_worker}")
    if memory is not None and not (math.isfinite(memory) and memory > 0):
        raise InputError(f"memory must be a positive number of GiB, got {memory}")
    given = {"prefill_tokens_per_second": prefill_tokens_per_second, "decode_step_seconds": decode_step_seconds}
    for argument, value in given.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{argument} must be a positive number, got {value}")
    if (prefill_tokens_per_second is None) != (decode_step_seconds is None):
        raise InputError("prefill_tokens_per_second and decode_step_seconds must be given together")
    if decode_step_seconds is not None and gpu == "measure":
        raise InputError("gpu 'measure' measures the rates, so none must be given")
    if adapter is not None and gpu != "measure":
        raise InputError(f"adapter must not be given with gpu {gpu!r}: only 'measure' runs the model")
    for argument, choice, known in (
        ("gpu", gpu, (*GPUS, "measure")),
        ("dtype", dtype, tuple(BYTES)),
        ("quantization", quantization, ("none", *QUANTISED_BYTES)),
    ):
        if choice not in known:
            raise InputError(f"{argument} must be one of {', '.join(known)}, got {choice!r}")
    check_dtype(quantization, dtype)
    reach_hub(name)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"model_name_or_path {name!r} cannot be read: {error}{offline_note()}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"model_name_or_path {name!r} must be a decoder-only language model, got {config.model_type}")
    try:
        shape = Shape.of(config, trust_remote_code)
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"model_name_or_path {name!r} must be a causal language model, got {config.model_type}: {error}"
        ) from error
    context = context_of(config)
    if context is not None and prompt_tokens + new_tokens > context:
        raise InputError(
            f"prompt_tokens and max_new_tokens must fit into the model's context of {context} tokens, got {prompt_tokens} "
            f"and {new_tokens}"
        )
    if shape.experts and quantization != "none":
        raise InputError(
            f"quantization must be none, the experts of a {config.model_type} cannot be quantised, got {quantization!r}"
        )
    job = Job(members, prompts, prompt_tokens, new_tokens, dtype, quantization)
    if memory is None and gpu == "measure":
        from essa.devices import free_memory_of

        available = float(free_memory_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    else:
        available = GPUS[gpu][2] if memory is None else memory * GIB
    available *= gpus_per_worker
    most = largest_row_budget(shape, job, available)
    if row_budget is not None and row_budget > most:
        raise InputError(f"row_budget: {most} sequences fit into {available / GIB:.1f} GiB, got {row_budget}")

    def budget(workers: int) -> int:
        rounds = math.ceil(job.rows / (workers * most))
        return row_budget or math.ceil(job.rows / (workers * rounds))

    workers = gpus // gpus_per_worker
    rows = budget(workers)
    if gpu == "measure":
        from essa.measure import rates_here

        rates = rates_here(
            name, job, rows, adapter=adapter, threads=threads_per_worker, trust_remote_code=trust_remote_code
        )
    elif prefill_tokens_per_second is not None and decode_step_seconds is not None:
        rates = functools.partial(rates_given, job, prefill_tokens_per_second, decode_step_seconds)
    else:
        rates = functools.partial(rates_of_gpu, shape, job, gpu=gpu)
    seconds = generation_seconds(job, rates(rows), rows, workers)
    return {
        "model": name,
        "parameters": shape.parameters,
        "workers": workers,
        "gpu": gpu,
        "gpus_per_worker": gpus_per_worker,
        "memory_per_worker_gib": (weight_bytes(shape, job) + rows * row_bytes(shape, job)) / GIB,
        "of_which_weights_gib": weight_bytes(shape, job) / GIB,
        "rows_per_generation": job.rows,
        "row_budget": rows,
        "members_per_chunk": rows / prompts,
        "chunks": math.ceil(job.rows / rows),
        "prefill_tokens_per_second": rows * prompt_tokens / rates(rows).prefill,
        "decode_step_seconds": rates(rows).step,
        "chunk_seconds": rates(rows).chunk(job),
        "generation_seconds": seconds,
        "tokens_per_second": job.rows * new_tokens / seconds,
        "scaling": scaling(job, rates, budget),
    }
