"""Warm start: a LoRA adapter trained on prompt/completion pairs, by a plain loop. It is where the search begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from essa.checkpoint import make_folder, write_folder
from essa.config import InputError, SFTConfig
from essa.data import Prompts, check_encodable, template_of
from essa.differentiable import make_differentiable
from essa.models import context_length, lora_config

IGNORED = -100


def sft(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    dataset: Any,
    args: SFTConfig,
    *,
    log: Callable[[int, float], None] | None = None,
) -> PeftModel:
    """Train a fresh LoRA adapter on `dataset` and save it to `args.output_dir`, an ordinary PEFT adapter folder.

    Args:
        model: the base model; it comes back wrapped.
        processing_class: its tokenizer.
        dataset: rows with `prompt` and `completion`, both text or both messages. The loss is the completion's.
        args: the settings.
        log: called with (step, loss) after every step.

    Raises:
        InputError: the rows, or `lora_target_modules`, cannot be used. Nothing has been written by then.
    """
    folder = Path(args.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output_dir {args.output_dir!r} is there already and not empty; choose another")
    examples = _examples(model, processing_class, dataset, args.chat_template_kwargs or {})
    torch.manual_seed(args.seed)
    lora = lora_config(model, args.lora_r, args.lora_alpha, args.lora_target_modules)
    try:
        peft_model = get_peft_model(model, lora)
    except ValueError as error:
        raise InputError(f"lora_target_modules {args.lora_target_modules!r}: {error}") from error
    make_differentiable(peft_model)
    make_folder(folder.parent, "the parent of output_dir")
    parameters = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    peft_model.train()
    batches = _batches(examples, args.batch_size, args.seed)
    for step in range(1, args.max_steps + 1):
        batch = _collate(next(batches), processing_class.pad_token_id, model.device)
        loss = peft_model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not torch.isfinite(loss):
            raise InputError(
                f"learning_rate {args.learning_rate!r} is too high: the loss is {loss.item()} at step {step}"
            )
        if log is not None:
            log(step, loss.item())
    peft_model.eval()
    write_folder(folder, lambda fresh: peft_model.save_pretrained(str(fresh)))
    return peft_model


@dataclass(frozen=True)
class _Example:
    prompt_ids: list[int]
    completion_ids: list[int]


def _examples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Any, template: dict[str, Any]
) -> list[_Example]:
    prompts = Prompts.check(dataset, tokenizer, name="dataset", room=None, chat_template_kwargs=template)
    completions = [
        _completion_text(row, number, prompts, tokenizer, template) for number, row in enumerate(prompts.rows)
    ]
    for number, text in enumerate(completions):
        check_encodable(text, f"dataset row {number}")
    end = [] if prompts.conversational or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt_ids = tokenizer(prompts.texts).input_ids
    completion_ids = tokenizer(completions, add_special_tokens=False).input_ids
    context = context_length(model)
    examples = []
    for number, (prompt, completion) in enumerate(zip(prompt_ids, completion_ids, strict=True)):
        if context is not None and len(prompt) + len(completion) + len(end) > context:
            raise InputError(
                f"dataset row {number}: prompt and completion have {len(prompt) + len(completion) + len(end)} tokens, "
                f"the model's context has {context}"
            )
        examples.append(_Example(prompt, completion + end))
    return examples


def _completion_text(
    row: dict[str, Any], number: int, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, template: dict[str, Any]
) -> str:
    completion = row.get("completion")
    if prompts.conversational and isinstance(completion, list) and completion:
        arguments = template_of(row, template)
        whole = str(tokenizer.apply_chat_template(row["prompt"] + completion, tokenize=False, **arguments))
        _, found, text = whole.partition(prompts.texts[number])
        if not found:
            raise InputError(f"dataset row {number}: the chat template changes the prompt once a completion follows it")
        return text
    if prompts.conversational or not isinstance(completion, str):
        kind = "a list of messages, as its prompt is" if prompts.conversational else "text"
        raise InputError(f"dataset row {number}: `completion` must be {kind}, got {completion!r}")
    return completion


def _batches(examples: list[_Example], size: int, seed: int) -> Iterator[list[_Example]]:
    """Endless batches; every epoch in a fresh order."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(len(examples), generator=generator).tolist()
        taken, queue = queue[:size], queue[size:]
        yield [examples[i] for i in taken]


def _collate(batch: list[_Example], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(example.prompt_ids) + len(example.completion_ids) for example in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    mask = torch.zeros((len(batch), width), dtype=torch.long)
    for row, example in enumerate(batch):
        start, end = len(example.prompt_ids), len(example.prompt_ids) + len(example.completion_ids)
        ids[row, :end] = torch.tensor(example.prompt_ids + example.completion_ids)
        labels[row, start:end] = ids[row, start:end]
        mask[row, :end] = 1
    return {"input_ids": ids.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}
