"""Prompts: which rows of a data set they are, checking them, and drawing them in an order that the seed alone decides.

A dataset is a list of rows. Each row has a `prompt`, as text or as chat messages; every other column is handed to the
reward functions. These are TRL's prompt-only dataset formats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from essa.config import InputError, setting
from essa.rows import read_rows

# A site of its own, in the range the noise contract keeps for uses that are not a layer.
PROMPT_SITE = 2**30 - 3
SPLIT_GENERATION = 2**32 - 1

DATASET_SPLIT = "Split of a dataset on the hub."
DATASET_CONFIG = "Configuration of a dataset on the hub that has several, like `comparisons`."
DATA_DIR = "Folder of a dataset on the hub that has several, like `harmless-base`. Default: all of them."

NOT_REWARD_COLUMNS = ("prompt", "completion", "completion_ids")


@dataclass(frozen=True)
class DataSettings:
    """Which rows of a data set a command works on, and which it only evaluates on. Fields are the command's options."""

    dataset_split: str = setting("train", DATASET_SPLIT)
    dataset_config: str | None = setting(None, DATASET_CONFIG)
    data_dir: str | None = setting(None, DATA_DIR)
    eval_dataset_name: str | None = setting(None, "Rows to evaluate on, never trained or searched on.")
    eval_dataset_split: str = setting("test", "Split of an evaluation dataset on the hub.")
    eval_dataset_config: str | None = setting(
        None,
        "Configuration of an evaluation dataset on the hub. Default: dataset_config, where it is the same dataset.",
    )
    eval_data_dir: str | None = setting(
        None, "Folder of an evaluation dataset on the hub. Default: data_dir, where it is the same dataset."
    )
    eval_split: float | None = setting(None, "Keep this fraction of dataset_name to evaluate on, and for nothing else.")

    def __post_init__(self) -> None:
        if self.eval_dataset_name is not None and self.eval_split is not None:
            raise InputError("eval_dataset_name and eval_split cannot both be given")

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval_dataset_name is not None or self.eval_split is not None

    def read(self, name: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """The rows of data set ``name`` to work on, and those to evaluate on."""
        rows = read_rows(name, split=self.dataset_split, config=self.dataset_config, data_dir=self.data_dir)
        if self.eval_split is not None:
            return split_rows(rows, self.eval_split, seed)
        if self.eval_dataset_name is None:
            return rows, None
        config, data_dir = self.eval_dataset_config, self.eval_data_dir
        if self.eval_dataset_name == name and config is None and data_dir is None:
            config, data_dir = self.dataset_config, self.data_dir
        evaluation = read_rows(
            self.eval_dataset_name,
            split=self.eval_dataset_split,
            config=config,
            data_dir=data_dir,
            argument="eval_dataset_name",
        )
        return rows, evaluation

    def recorded(self) -> dict[str, Any]:
        """The options, for a command that is to be resumed from anywhere."""
        return {**dataclasses.asdict(self), "eval_dataset_name": absolute(self.eval_dataset_name)}


def absolute(name: str | None) -> str | None:
    """The absolute path of a file or folder that is there; a name on the hub as it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name


def split_rows(
    rows: Sequence[dict[str, Any]], fraction: float, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`(train, evaluation)`: a random `fraction` of the rows, at least one, is kept out for evaluation."""
    if not 0.0 < fraction < 1.0:
        raise InputError(f"eval_split must be above 0 and below 1, got {fraction!r}")
    held_out = max(1, round(fraction * len(rows)))
    if held_out >= len(rows):
        raise InputError(f"eval_split {fraction!r} of {len(rows)} rows leaves nothing to train on")
    order = _permutation(len(rows), seed, SPLIT_GENERATION)
    return [rows[i] for i in sorted(order[held_out:])], [rows[i] for i in sorted(order[:held_out])]


def _permutation(size: int, seed: int, generation: int) -> list[int]:
    """The same permutation of `range(size)` on every machine, for it sorts noise that is."""
    import essa_kernels

    key = essa_kernels.NoiseKey(seed, generation, PROMPT_SITE)
    return essa_kernels.gaussian((size,), key).argsort(stable=True).tolist()


class PromptSampler:
    """Which prompts each generation sees: epochs of the whole set, each in an order of its own, laid end to end."""

    def __init__(self, size: int, per_generation: int, seed: int) -> None:
        if per_generation > size:
            raise InputError(
                f"prompts_per_generation must be at most the {size} training prompts, got {per_generation}"
            )
        self.size, self.per_generation, self.seed = size, per_generation, seed
        self._orders: dict[int, list[int]] = {}

    def indices(self, generation: int) -> list[int]:
        """Row numbers for one generation, deterministic in (seed, generation)."""
        start = generation * self.per_generation
        return [self._at(position) for position in range(start, start + self.per_generation)]

    def epoch(self, generation: int) -> float:
        """Passes over the data made once `generation` generations are over."""
        return generation * self.per_generation / self.size

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = _permutation(self.size, self.seed, epoch)
        return self._orders[epoch][place]


@dataclass(frozen=True)
class Prompts:
    """A checked dataset.

    Attributes:
        name: the argument it came from, for messages.
        rows: the rows as given.
        texts: what the model reads, one string a row; chat messages have gone through the chat template.
        conversational: whether prompts were given as chat messages.
        columns: further columns, the reward functions' keyword arguments.
    """

    name: str
    rows: list[dict[str, Any]]
    texts: list[str]
    conversational: bool
    columns: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data in a checkpoint: the number of rows and a digest of all of them."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"rows": len(self.rows), "sha256": digest.hexdigest()}

    @classmethod
    def check(
        cls,
        dataset: Iterable[dict[str, Any]],
        processing_class: Any,
        *,
        name: str,
        room: int | None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> Prompts:
        """Check a `datasets.Dataset` or list of rows and render its prompts.

        Args:
            dataset: rows with `prompt` as text or as messages (`{"role": ..., "content": ...}`), all of one kind.
            processing_class: the tokenizer.
            name: the argument's name, for messages.
            room: the most tokens a prompt may have, or None where the model sets no limit.
            chat_template_kwargs: further arguments of the chat template, where a row has none of its own in columns
                `tools` and `chat_template_kwargs`.

        Raises:
            InputError: naming the argument and the first row that is wrong.
        """
        if isinstance(dataset, dict):
            raise InputError(f"{name} must be one dataset, got a dict of {', '.join(map(repr, dataset)) or 'none'}")
        if isinstance(dataset, (str, bytes)) or not hasattr(dataset, "__len__"):
            raise InputError(f"{name} must be a datasets.Dataset or a list of rows, got {type(dataset).__name__}")
        rows = list(dataset)
        if not rows:
            raise InputError(f"{name} is empty")
        for number, row in enumerate(rows):
            _check_row(row, number, name)
        conversational = not isinstance(rows[0]["prompt"], str)
        for number, row in enumerate(rows):
            if isinstance(row["prompt"], str) == conversational:
                raise InputError(f"{name} row {number}: prompts must be all text or all messages, got both kinds")
        if conversational:
            texts = _apply_chat_template(rows, processing_class, name, chat_template_kwargs or {})
        elif chat_template_kwargs:
            raise InputError(f"chat_template_kwargs needs prompts that are messages, but those of {name} are text")
        else:
            texts = [row["prompt"] for row in rows]
        for number, text in enumerate(texts):
            check_encodable(text, f"{name} row {number}")
        if room is not None:
            _check_lengths(texts, processing_class, name, room)
        columns = [column for column in rows[0] if column not in NOT_REWARD_COLUMNS]
        for number, row in enumerate(rows):
            missing = [column for column in columns if column not in row]
            if missing:
                raise InputError(f"{name} row {number} lacks the column {missing[0]!r} that row 0 has")
        return cls(name, rows, texts, conversational, columns)


def template_of(row: dict[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    """A row's arguments of the chat template: its own, by TRL's column names, before those of all rows."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {**tools, **template, **(row.get("chat_template_kwargs") or {})}


def check_encodable(text: str, where: str) -> None:
    """Raise `InputError` for text that is no Unicode, as JSON's "\\ud800" makes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair, {text[error.start]!r}, is no character") from error


def _check_row(row: Any, number: int, name: str) -> None:
    if not isinstance(row, dict):
        raise InputError(f"{name} row {number} must be an object with a `prompt`, got {type(row).__name__}")
    if "prompt" not in row:
        raise InputError(f"{name} row {number} has no `prompt` column, only {', '.join(map(repr, row)) or 'nothing'}")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        if not prompt:
            raise InputError(f"{name} row {number}: `prompt` is empty")
        return
    if not isinstance(prompt, list) or not prompt:
        raise InputError(
            f"{name} row {number}: `prompt` must be text or a list of messages, got {type(prompt).__name__} {prompt!r}"
        )
    for message in prompt:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"{name} row {number}: a message must be {{'role': ..., 'content': ...}}, got {message!r}")


def _apply_chat_template(
    rows: list[dict[str, Any]], processing_class: Any, name: str, template: dict[str, Any]
) -> list[str]:
    if not getattr(processing_class, "chat_template", None):
        raise InputError(f"{name} has prompts as messages, but the tokenizer has no chat template; give them as text")
    texts = []
    for number, row in enumerate(rows):
        # A conversation that ends with the assistant is one to continue, as in TRL.
        to_continue = row["prompt"][-1]["role"] == "assistant"
        try:
            text = processing_class.apply_chat_template(
                row["prompt"],
                tokenize=False,
                add_generation_prompt=not to_continue,
                continue_final_message=to_continue,
                **template_of(row, template),
            )
        except Exception as error:
            raise InputError(f"{name} row {number}: the chat template refused the messages: {error}") from error
        texts.append(text)
    # The rollout's tokenizer call adds the beginning-of-sequence token itself; a template that wrote it would double it.
    bos = processing_class.bos_token
    if bos and processing_class("").input_ids[:1] == [processing_class.bos_token_id]:
        texts = [text.removeprefix(bos) for text in texts]
    return texts


def _check_lengths(texts: list[str], processing_class: Any, name: str, room: int) -> None:
    if room < 1:
        raise InputError(f"max_new_tokens leaves no room for a prompt in the model's context ({room} tokens left)")
    for number, ids in enumerate(processing_class(texts).input_ids):
        if len(ids) > room:
            raise InputError(
                f"{name} row {number}: the prompt has {len(ids)} tokens, but only {room} fit into the model's context "
                f"beside max_new_tokens: {texts[number][:80]!r}"
            )
        if not ids:
            raise InputError(f"{name} row {number}: the tokenizer makes no token of the prompt {texts[number][:80]!r}")
