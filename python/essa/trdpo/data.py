"""Preference data: reading its formats, checking every row, and turning rows into token ids.

Pairs are TRL's `prompt`, `chosen`, `rejected`, as text or as chat messages, with the prompt in a column of its own or at
the head of both completions. Judged rows are TRL's `prompt`, `completion`, `label`, for KTO; pairs serve KTO as two rows
each. Anthropic's HH dialogues and OpenAI's summaries of Reddit posts (TL;DR) are recognised by their columns.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import numpy as np

from essa.config import InputError
from essa.data import check_encodable, template_of
from essa.trdpo.columns import (
    HH_ASSISTANT,
    HH_HUMAN,
    PAIR,
    check_scores,
    check_turns,
    looks_swapped,
    repeats_prompt,
)

logger = logging.getLogger(__name__)

JUDGED, TLDR = ("completion", "label"), ("info", "summaries", "choice")
LABELS = {"true": True, "1": True, "false": False, "0": False}
"""As a CSV file has them, in any case."""
CHUNK = 1000


@dataclass
class Example:
    """One row as token ids: int32 arrays. Of a pair `completions` are (chosen, rejected), of a judged row one.

    Attributes:
        row: its number in the dataset.
        prompt, completions: what the model reads; the completions are what it is scored on.
        desirable: a judged row's label.
        reference: the reference's log-probabilities of the completions, where they are computed beforehand.
    """

    row: int
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    desirable: bool | None = None
    reference: tuple[float, ...] | None = None


@dataclass
class Preferences(Sequence[Example]):
    """A checked dataset.

    Attributes:
        name: the argument it came from, for messages.
        identical: how many pairs have the same chosen and rejected completion, and so teach nothing.
        truncated: how many rows had a completion cut to max_length.
        empty: how many of Anthropic's dialogues end in a turn that says nothing, and were left out.
        rows: how many were kept.
        doubled, swapped: how many of them have text columns that do not look like what their names say.
    """

    name: str
    examples: list[Example] = field(default_factory=list)
    identical: int = 0
    truncated: int = 0
    empty: int = 0
    rows: int = 0
    doubled: int = 0
    swapped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        return self.examples[index]

    def check_lengths(self, context: int) -> None:
        """Raise `InputError` for a row that is longer than a model's context."""
        for example in self.examples:
            tokens = len(example.prompt) + max(map(len, example.completions))
            if tokens > context:
                raise InputError(
                    f"{self.name} row {example.row} has {tokens} tokens, more than the model's context of {context}; set "
                    f"max_length to at most {context}, which cuts completions, or drop the row"
                )

    def report(self) -> None:
        """Warn of what the rows are no error for."""
        if self.identical:
            logger.warning(
                "%s: %d of %d pairs have the same chosen and rejected completion and teach nothing",
                self.name,
                self.identical,
                len(self),
            )
        if self.truncated:
            logger.warning("%s: %d of %d rows had a completion cut to max_length", self.name, self.truncated, len(self))
        if self.empty:
            logger.warning("%s: left out %d dialogues whose last turn is empty", self.name, self.empty)
        if self.doubled > self.rows / 2:
            logger.warning(
                "%s: in %d of %d rows the completions begin with their prompt, so that the model reads it twice; if they are "
                "to hold it, leave the column `prompt` out",
                self.name,
                self.doubled,
                self.rows,
            )
        if self.swapped > self.rows / 2:
            logger.warning(
                "%s: in %d of %d rows `chosen` looks more like a prompt than `prompt` and `rejected` do; are the columns "
                "swapped?",
                self.name,
                self.swapped,
                self.rows,
            )


def read_preferences(
    dataset: Iterable[dict[str, Any]], tokenizer: Any, *, name: str, kto: bool, max_length: int | None
) -> Preferences:
    """Check every row of a `datasets.Dataset` or list and tokenise it.

    Args:
        dataset: the rows, all in one of the formats above.
        tokenizer: the model's; text completions are closed with its end token.
        name: the argument's name, for messages.
        kto: whether judged rows are wanted instead of pairs.
        max_length: the most tokens of prompt and completion: longer completions are cut.

    Raises:
        InputError: naming the argument, the first row that is wrong, and what is allowed.
    """
    if isinstance(dataset, (str, bytes, dict)) or not hasattr(dataset, "__len__"):
        raise InputError(f"{name} must be a datasets.Dataset or a list of rows, got {type(dataset).__name__}")
    rows = list(dataset)
    if not rows:
        raise InputError(f"{name} is empty")
    check_scores(rows, name)
    kept = [(number, row) for number, row in enumerate(rows) if not _ends_silent(row)]
    if not kept:
        raise InputError(f"{name}: every dialogue's last turn is empty")
    plain = [_plain_row(row, number, name, kto) for number, row in kept]
    preferences = Preferences(
        name,
        empty=len(rows) - len(kept),
        rows=len(plain),
        doubled=sum(repeats_prompt(row.prompt, row.completions) for row in plain),
        swapped=sum(looks_swapped(row.prompt, row.completions) for row in plain),
    )
    if kto:
        plain = [half for row in plain for half in row.halves()]
    conversational = not isinstance(plain[0].prompt, str)
    for row in plain:
        if isinstance(row.prompt, str) == conversational:
            raise InputError(f"{name} row {row.number}: rows must be all text or all messages, got both kinds")
    if conversational and not getattr(tokenizer, "chat_template", None):
        raise InputError(f"{name} has messages, but the tokenizer has no chat template; give them as text")
    for start in range(0, len(plain), CHUNK):
        for example in _tokenise(plain[start : start + CHUNK], conversational, tokenizer, name):
            _fit(example, preferences, max_length)
    if kto and len({example.desirable for example in preferences.examples}) < 2:
        only = preferences.examples[0].desirable
        raise InputError(f"{name}: kto needs rows of both labels, but every label is {only}")
    return preferences


@dataclass(frozen=True)
class _Row:
    number: int
    prompt: Any
    completions: tuple[Any, ...]
    desirable: bool | None
    template: dict[str, Any]

    def halves(self) -> list[_Row]:
        """A pair as two judged rows; a judged row as it is."""
        if self.desirable is not None:
            return [self]
        return [
            replace(self, completions=(completion,), desirable=desirable)
            for completion, desirable in zip(self.completions, (True, False), strict=True)
        ]


def _plain_row(row: Any, number: int, name: str, kto: bool) -> _Row:
    if not isinstance(row, dict):
        raise InputError(f"{name} row {number} must be an object, got {type(row).__name__}")
    where = f"{name} row {number}"
    row = _from_tldr(row, where) if row.keys() >= set(TLDR) else row
    template = template_of(row, {})
    if row.keys() >= set(PAIR):
        prompt, chosen, rejected = _explicit(row, where)
        _check_row(prompt, {"chosen": chosen, "rejected": rejected}, where)
        return _Row(number, prompt, (chosen, rejected), None, template)
    if not kto or not row.keys() >= {"prompt", *JUDGED}:
        wanted = "`prompt`, `completion` and `label`, or `chosen` and `rejected`" if kto else "`chosen` and `rejected`"
        hint = "; judged rows are for loss_type kto" if not kto and row.keys() >= set(JUDGED) else ""
        raise InputError(f"{where} must have {wanted}, got {', '.join(map(repr, row)) or 'no columns'}{hint}")
    label = row["label"]
    label = LABELS.get(label.strip().lower(), label) if isinstance(label, str) else label
    if not isinstance(label, (bool, np.bool_)) and label not in (0, 1):
        raise InputError(f"{where}: `label` must be true or false, got {label!r}")
    check_turns({"completion": row["completion"]}, where)
    _check_row(row["prompt"], {"completion": row["completion"]}, where)
    return _Row(number, row["prompt"], (row["completion"],), bool(label), template)


def _ends_silent(row: Any) -> bool:
    """Whether one of the two is a dialogue in Anthropic's layout whose last turn says nothing: they have a few."""
    if not isinstance(row, dict) or row.get("prompt") is not None:
        return False
    dialogues = [text for column in PAIR if isinstance(text := row.get(column), str) and text.startswith(HH_HUMAN)]
    return any(not text.rpartition(HH_ASSISTANT)[2].strip() for text in dialogues)


def _from_tldr(row: dict[str, Any], where: str) -> dict[str, Any]:
    """OpenAI's comparisons of summaries: a post, two summaries, and which one was preferred."""
    try:
        post, texts, choice = row["info"], [summary["text"] for summary in row["summaries"]], int(row["choice"])
        title = f"TITLE: {post['title']}\n\n" if post.get("title") else ""
        subreddit = f"SUBREDDIT: r/{post['subreddit']}\n\n" if post.get("subreddit") else ""
        body = post.get("post") or post["article"]
        if not body:
            raise ValueError("there must be a post or an article")
        prompt = f"{subreddit}{title}POST: {body}\n\nTL;DR:"
        if len(texts) != 2 or choice not in (0, 1):
            raise ValueError(f"there must be two summaries and a choice of 0 or 1, got {len(texts)} and {choice}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} has TL;DR's columns, but not its content: {error!r}") from error
    chosen, rejected = (" " + texts[i].strip() for i in (choice, 1 - choice))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _explicit(row: dict[str, Any], where: str) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected; the prompt is taken off the head of both completions where it stands there."""
    chosen, rejected = row["chosen"], row["rejected"]
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise InputError(
            f"{where}: `chosen` and `rejected` must both be text or both be messages, got {type(chosen).__name__} and "
            f"{type(rejected).__name__}"
        )
    prompt = row.get("prompt")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        check_turns({"chosen": chosen, "rejected": rejected}, where)
        return prompt, chosen, rejected
    if prompt is not None and isinstance(chosen, str):
        raise InputError(f"{where}: `prompt` is messages, so `chosen` and `rejected` must be messages, got text")
    # A text prompt beside whole conversations only repeats their first message.
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))))
    if isinstance(chosen, list):
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
    elif chosen.startswith(HH_HUMAN):
        found = chosen.rfind(HH_ASSISTANT, 0, shared)
        if found < 0:
            raise InputError(f"{where}: the two dialogues share no turn that ends in {HH_ASSISTANT!r}")
        shared = found + len(HH_ASSISTANT)
    else:
        shared -= shared > 0 and chosen[shared - 1] == " "
    if shared < 1:
        raise InputError(f"{where} has no `prompt`, and `chosen` and `rejected` do not begin alike")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_row(prompt: Any, completions: dict[str, Any], where: str) -> None:
    for column, value in {"prompt": prompt, **completions}.items():
        if not isinstance(value, (str, list)):
            raise InputError(f"{where}: `{column}` must be text or a list of messages, got {type(value).__name__}")
        if isinstance(value, str) != isinstance(prompt, str):
            raise InputError(f"{where}: `prompt` and `{column}` must both be text or both be messages")
        if isinstance(value, list):
            _check_messages(value, column, where)
        if not value or (column != "prompt" and not _has_text(value)):
            raise InputError(f"{where}: `{column}` is empty")


def _check_messages(messages: list[Any], column: str, where: str) -> None:
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{where}: a message must be {{'role': ..., 'content': ...}}, got {message!r}")
    if column != "prompt" and messages and messages[0]["role"] != "assistant":
        raise InputError(
            f"{where}: `{column}` must begin with a message of the assistant, got one of {messages[0]['role']!r}; are "
            "the columns swapped?"
        )


def _has_text(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else any(message["content"] for message in value)


def _tokenise(rows: list[_Row], conversational: bool, tokenizer: Any, name: str) -> Iterator[Example]:
    texts: list[str] = []
    for row in rows:
        for text in _texts(row, tokenizer, name):
            check_encodable(text, f"{name} row {row.number}")
            texts.append(text)
    # The chat template has written the special tokens already.
    encoded = iter(tokenizer(texts, add_special_tokens=not conversational)["input_ids"])
    for row in rows:
        prompt, *wholes = (next(encoded) for _ in range(1 + len(row.completions)))
        # A token may run across the boundary; the completion then begins with it.
        shared = min(_common(prompt, whole) for whole in wholes)
        parts = tuple(np.array(whole[shared:], dtype=np.int32) for whole in wholes)
        yield Example(row.number, np.array(prompt[:shared], dtype=np.int32), parts, row.desirable)


def _texts(row: _Row, tokenizer: Any, name: str) -> list[str]:
    """The prompt, and the prompt with each completion."""
    if isinstance(row.prompt, str):
        end = tokenizer.eos_token or ""
        wholes = [row.prompt + completion for completion in row.completions]
        return [row.prompt, *(whole if end and whole.endswith(end) else whole + end for whole in wholes)]
    try:
        return [
            tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True, **row.template),
            *(
                tokenizer.apply_chat_template(row.prompt + completion, tokenize=False, **row.template)
                for completion in row.completions
            ),
        ]
    except Exception as error:
        raise InputError(f"{name} row {row.number}: the chat template refused the messages: {error}") from error


def _common(first: list[int], second: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def _fit(example: Example, preferences: Preferences, max_length: int | None) -> None:
    where = f"{preferences.name} row {example.row}"
    if not len(example.prompt):
        raise InputError(f"{where}: the tokenizer makes no token of the prompt that precedes the completion")
    if max_length is not None and len(example.prompt) >= max_length:
        raise InputError(
            f"{where}: the prompt has {len(example.prompt)} tokens, which leaves nothing of max_length {max_length} "
            "for a completion; raise max_length or drop the row"
        )
    room = None if max_length is None else max_length - len(example.prompt)
    if room is not None and any(len(completion) > room for completion in example.completions):
        preferences.truncated += 1
        example.completions = tuple(completion[:room] for completion in example.completions)
    if not all(map(len, example.completions)):
        raise InputError(f"{where}: the tokenizer makes no token of a completion")
    if len(example.completions) == 2 and np.array_equal(*example.completions):
        preferences.identical += 1
    preferences.examples.append(example)
