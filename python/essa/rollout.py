"""Completions of a whole population: every member's model answers prompts, many rows to a batch.

The rows, one for each completion in the order of members and of prompts within a member, are cut into batches of
`row_budget` and nothing else decides the cut, so a completion does not depend on the hardware or on who computes it.
Rows that have ended leave the batch.

Sampling draws one uniform number a token from the noise contract, keyed by seed, generation, member, prompt and position,
and looks it up in the cumulated probabilities. It is the same number whichever batch the row is in.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import essa_kernels
from essa.attention import kernel_attention
from essa.config import InputError
from essa.kv_cache import grow_in_place
from essa.models import bare, context_length, whole_head_input
from essa_kernels.nn import Parametrization, Population, SVDLoRA
from essa_kernels.noise import SAMPLING_SITE

# A batch is packed once this fraction of its rows, or less, is still running: packing copies the KV cache.
PACK_BELOW = 0.75


@dataclass(frozen=True)
class Completion:
    """One completion.

    Attributes:
        text: the decoded completion, without special tokens.
        token_ids: what was generated, the end token included.
        finished: whether it ended with an end token, not at max_new_tokens.
    """

    text: str
    token_ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Rollout:
    """What `generate` returns.

    Attributes:
        completions: for each member the completions of the prompts it answered, in their order.
        tokens: how many tokens were generated.
        seconds: how long it took.
    """

    completions: list[list[Completion]]
    tokens: int
    seconds: float


def generate(
    model: nn.Module,
    processing_class: Any,
    prompts: Sequence[str],
    *,
    space: Parametrization | SVDLoRA | None = None,
    values: Any = None,
    assignment: str = "all",
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    generation: int = 0,
    row_budget: int = 256,
    rows: range | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Complete the prompts with every member of a population.

    Of the model's `generation_config` the end tokens alone are used.

    Args:
        model: a decoder-only transformers model or a PeftModel around one.
        processing_class: its tokenizer.
        prompts: texts; the tokenizer adds its special tokens.
        space, values: a parametrisation of the model, and members as its ``attach`` takes them; for an `SVDLoRA` their
            singular values, float32 [members, size]. Both None: the model as it is, with whatever adapter is active, is
            the one member.
        assignment: "all": every member answers every prompt. "per_prompt": member m answers prompt
            m // (members // len(prompts)) only.
        max_new_tokens: the longest completion.
        temperature: 0 takes the likeliest token (the first of equals); above 0 samples.
        seed, generation: the key of the sampling.
        row_budget: the most rows in a batch.
        rows: complete these rows only; None completes all.
        progress: called after each batch with the completions done and the completions in all.

    Raises:
        InputError: an argument is wrong, or a prompt is empty or does not fit the model's context.
    """
    started = time.perf_counter()
    if isinstance(prompts, str) or not len(prompts):
        raise InputError(f"prompts must be a list of at least one text, got {prompts!r}")
    _check_count("max_new_tokens", max_new_tokens)
    _check_count("row_budget", row_budget)
    if not (isinstance(temperature, (int, float)) and 0 <= temperature < math.inf):
        raise InputError(f"temperature must be a finite number of at least 0, got {temperature!r}")
    members = _members(space, values, assignment, len(prompts))
    count = members if assignment == "per_prompt" else members * len(prompts)
    rows = range(count) if rows is None else rows
    owners = dict(zip(rows, owners_of(rows, assignment, members, len(prompts)), strict=True))
    base = bare(model)
    encoded = _encode(
        base, processing_class, {prompt: prompts[prompt] for _, prompt in owners.values()}, max_new_tokens
    )
    ends = _end_tokens(base, processing_class)

    decoder = _Decoder(base, ends, max_new_tokens)
    key = essa_kernels.NoiseKey(seed, generation, SAMPLING_SITE)
    generated: list[list[int]] = []
    with torch.inference_mode(), _evaluating(base), whole_head_input(base), kernel_attention(base):
        for part in batches(rows, row_budget, None if space is None or space.batched else len(prompts)):
            batch = [owners[row] for row in part]
            pick = _Sampler(key, batch, len(prompts), max_new_tokens, temperature) if temperature else _greedy
            ids = [encoded[prompt] for _, prompt in batch]
            if space is None or values is None:
                generated += decoder.run(ids, pick)
            else:
                first, last = batch[0][0], batch[-1][0]
                attached = torch.tensor([member - first for member, _ in batch])
                with space.attach(values[first : last + 1]) as population:
                    generated += decoder.run(ids, pick, functools.partial(_assign, population, attached))
            if progress is not None:
                progress(len(generated), len(rows))

    completions: list[list[Completion]] = [[] for _ in range(members)]
    for (member, _), completion in zip(owners.values(), _decode(processing_class, generated, ends), strict=True):
        completions[member].append(completion)
    return Rollout(completions, sum(map(len, generated)), time.perf_counter() - started)


def owners_of(rows: range, assignment: str, members: int, prompts: int) -> Iterator[tuple[int, int]]:
    """Whose completion each row is, and of which prompt: (member, place among the prompts)."""
    for row in rows:
        yield divmod(row, prompts) if assignment == "all" else (row, row * prompts // members)


def batches(rows: range, row_budget: int, member_rows: int | None = None) -> list[range]:
    """Rows cut into batches of at most ``row_budget``; with ``member_rows``, the rows that each member has, also between
    members."""
    cut, start = [], rows.start
    while start < rows.stop:
        stop = min(start + row_budget, rows.stop)
        if member_rows is not None:
            stop = min(stop, (start // member_rows + 1) * member_rows)
        cut.append(range(start, stop))
        start = stop
    return cut


class _Decoder:
    """Runs batches of rows through the model, token after token."""

    def __init__(self, model: Any, ends: list[int], max_new_tokens: int) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.ends = torch.tensor(ends, device=self.device)
        self.max_new_tokens = max_new_tokens
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}

    def run(
        self,
        prompts: list[list[int]],
        pick: Callable[[Tensor, Tensor, int], Tensor],
        assign: Callable[[Tensor], None] | None = None,
    ) -> list[list[int]]:
        """The tokens each row generates. `assign` is told which rows the batch holds, at first and when some leave."""
        inputs, mask, positions = self._prompt_inputs(prompts)
        rows = torch.arange(len(prompts), device=self.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        generated = torch.zeros(len(prompts), self.max_new_tokens, dtype=torch.int64, device=self.device)
        cache = None
        if assign is not None:
            assign(rows)
        for step in range(self.max_new_tokens):
            output = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions.clone(),  # XGLM, before transformers 5, shifts them in place
                past_key_values=cache,
                **self.options,
            )
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise InputError(
                    f"model must return past_key_values to be decoded, {type(self.model).__name__} does not"
                )
            if step == 0:
                grow_in_place(cache, inputs.shape[1] + self.max_new_tokens)
            tokens = pick(output.logits[:, -1], rows, step)
            generated[rows, step] = tokens
            ended |= torch.isin(tokens, self.ends)
            running = len(ended) - int(ended.sum())
            if not running or step + 1 == self.max_new_tokens:
                break
            if running <= PACK_BELOW * len(ended):
                keep = (~ended).nonzero().squeeze(1)
                rows, tokens, ended = rows[keep], tokens[keep], ended[keep]
                _keep_rows(cache, keep)
                mask, positions = None if mask is None else mask[keep], positions[keep]
                if assign is not None:
                    assign(rows)
            inputs = tokens.unsqueeze(1)
            positions = positions[:, -1:] + 1
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return self._until_end(generated)

    def _prompt_inputs(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Token ids [rows, length], padded on the left; mask, or None where nothing is padded; positions."""
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts], device=self.device)
        padding = torch.tensor([[length - len(prompt)] for prompt in prompts], device=self.device)
        positions = torch.arange(length, device=self.device) - padding
        is_padded = any(len(prompt) < length for prompt in prompts)
        return ids, (positions >= 0).long() if is_padded else None, positions.clamp(min=0)

    def _until_end(self, generated: Tensor) -> list[list[int]]:
        is_end = torch.isin(generated, self.ends)
        lengths = torch.where(is_end.any(1), is_end.int().argmax(1) + 1, self.max_new_tokens)
        return [tokens[:length] for tokens, length in zip(generated.tolist(), lengths.tolist(), strict=True)]


def _keep_rows(cache: Any, rows: Tensor) -> None:
    # Meant for beams, it takes fewer rows too, and unlike batch_select_indices every kind of layer has it.
    cache.reorder_cache(rows)
    if hasattr(cache, "linear_cache"):  # MiniMax keeps the states of its linear layers beside the layers
        cache.linear_cache = [
            state.index_select(0, rows.to(state.device)) if isinstance(state, Tensor) else state
            for state in cache.linear_cache
        ]


def _assign(population: Population, owners: Tensor, rows: Tensor) -> None:
    """Tell a population the rows of its batch, given the member that owns each row, ascending."""
    population.assign(torch.searchsorted(owners[rows.cpu()], torch.arange(population.members + 1)))


def _greedy(logits: Tensor, rows: Tensor, step: int) -> Tensor:
    return logits.argmax(-1)


class _Sampler:
    """Samples from softmax(logits / temperature) by inversion."""

    def __init__(
        self,
        key: essa_kernels.NoiseKey,
        batch: list[tuple[int, int]],
        prompts: int,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self.temperature = temperature
        noise: dict[int, Tensor] = {}
        for member, _ in batch:
            if member not in noise:
                # Even members only, whose noise is independent: 2k and 2k + 1 mirror each other.
                noise[member] = essa_kernels.gaussian((prompts, max_new_tokens), key, 2 * member)
        normal = torch.stack([noise[member][prompt] for member, prompt in batch])
        self.uniform = torch.special.ndtr(normal.double())

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> Tensor:
        cumulated = (logits.float() / self.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = self.uniform.to(logits.device)[rows, step, None]
        return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).squeeze(1)


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")


def _members(space: Any, values: Any, assignment: str, prompts: int) -> int:
    if (space is None) != (values is None):
        given, missing = ("values", "space") if space is None else ("space", "values")
        raise InputError(f"space and values belong together, got {given} without {missing}")
    members = 1
    if space is not None and values is not None:
        if isinstance(values, Tensor) and (values.dim() != 2 or values.shape[1] != space.size or not len(values)):
            raise InputError(f"values must have shape [members, {space.size}], got {list(values.shape)}")
        members = len(values)
    if assignment not in ("all", "per_prompt"):
        raise InputError(f"assignment must be 'all' or 'per_prompt', got {assignment!r}")
    if assignment == "per_prompt" and members % prompts:
        raise InputError(f"per_prompt needs members in multiples of the {prompts} prompts, got {members} members")
    return members


def _encode(model: Any, processing_class: Any, prompts: dict[int, str], max_new_tokens: int) -> dict[int, list[int]]:
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"model must be a decoder-only language model, got {type(model).__name__}")
    encoded = dict(zip(prompts, processing_class(list(prompts.values()))["input_ids"], strict=True))
    context, vocabulary = context_length(model), model.get_input_embeddings().weight.shape[0]
    for number, ids in encoded.items():
        if not ids:
            raise InputError(f"prompt {number}: the tokenizer makes no token of {prompts[number][:80]!r}")
        if context is not None and len(ids) + max_new_tokens > context:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens: with max_new_tokens={max_new_tokens} it exceeds the model's "
                f"context of {context}: {prompts[number][:80]!r}"
            )
        if max(ids) >= vocabulary:
            raise InputError(
                f"prompt {number} has token {max(ids)}, the model's vocabulary has {vocabulary}: "
                "processing_class is another model's tokenizer"
            )
    return encoded


def _end_tokens(model: Any, processing_class: Any) -> list[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        ends = processing_class.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _decode(processing_class: Any, generated: list[list[int]], ends: list[int]) -> Iterator[Completion]:
    unique = {tuple(tokens): "" for tokens in generated}  # members of a population agree more often than not
    contents = [tokens[:-1] if tokens[-1] in ends else tokens for tokens in unique]
    texts = dict(zip(unique, processing_class.batch_decode(contents, skip_special_tokens=True), strict=True))
    for tokens in generated:
        yield Completion(texts[tuple(tokens)], tokens, tokens[-1] in ends)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and the like are off inside."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
