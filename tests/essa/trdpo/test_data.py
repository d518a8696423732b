"""Preference data: every format TRL's trainers take, tokenised as they tokenise it, and every row that is refused."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from essa.config import InputError
from essa.rows import read_rows
from essa.trdpo.batches import PACKED, PADDED, SHARED, Collator
from essa.trdpo.data import read_preferences

from .conftest import make_pairs

PAIR = {"prompt": "?1=", "chosen": "12", "rejected": "3"}
HH_HEAD = "\n\nHuman: 2+2\n\nAssistant:"
JUDGED = {"prompt": "?1=", "completion": "12", "label": True}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(rows, tokenizer, *, kto=False, max_length=None):
    return read_preferences(rows, tokenizer, name="train_dataset", kto=kto, max_length=max_length)


def texts(example, tokenizer):
    return [tokenizer.decode(part) for part in (example.prompt, *example.completions)]


CONVERSATION = {"prompt": [user("1")], "chosen": [assistant("12")], "rejected": [assistant("3")]}
SAME = {
    "explicit": PAIR,
    "implicit": {"chosen": "?1=12", "rejected": "?1=3"},
    "with-end": {**PAIR, "chosen": "12<eos>"},
}


@pytest.mark.parametrize("layout", SAME)
def test_pairs_of_text(layout, tokenizer):
    (example,) = read([SAME[layout]], tokenizer)
    assert texts(example, tokenizer) == ["?1=", "12<eos>", "3<eos>"]
    assert example.row == 0 and example.desirable is None


@pytest.mark.parametrize(
    "row",
    [
        CONVERSATION,
        {"chosen": [user("1"), assistant("12")], "rejected": [user("1"), assistant("3")]},
        {"prompt": "1", "chosen": [user("1"), assistant("12")], "rejected": [user("1"), assistant("3")]},
    ],
    ids=["explicit", "implicit", "ultrafeedback"],
)
def test_pairs_of_messages(row, chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ '?' if m.role == 'user' else '=' }}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}={% endif %}"
    )
    (example,) = read([row], chat_tokenizer)
    assert texts(example, chat_tokenizer) == ["?1=", "12", "3"]


def tails(head, completions, tokenizer):
    """Token ids of completions behind a head."""
    start = len(tokenizer(head)["input_ids"])
    return [tokenizer(head + completion + "<eos>")["input_ids"][start:] for completion in completions]


def test_anthropics_dialogues(tokenizer):
    head = "\n\nHuman: 1+1\n\nAssistant: 2\n\nHuman: 2+2\n\nAssistant:"
    (example,) = read([{"chosen": head + " 4 and more", "rejected": head + " 4"}], tokenizer)
    assert len(example.prompt) == len(tokenizer(head)["input_ids"])
    assert [c.tolist() for c in example.completions] == tails(head, [" 4 and more", " 4"], tokenizer)
    with pytest.raises(InputError, match="share no turn"):
        read([{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}], tokenizer)


def test_openais_summaries(tokenizer):
    post = {"post": "12", "title": "1", "subreddit": "3"}
    row = {"info": post, "summaries": [{"text": "4"}, {"text": " 56"}], "choice": 1}
    (example,) = read([row], tokenizer)
    prompt = "SUBREDDIT: r/3\n\nTITLE: 1\n\nPOST: 12\n\nTL;DR:"
    assert len(example.prompt) == len(tokenizer(prompt)["input_ids"])
    assert [completion.tolist() for completion in example.completions] == tails(prompt, [" 56", " 4"], tokenizer)
    with pytest.raises(InputError, match="row 0 has TL;DR's columns, but not its content"):
        read([{**row, "choice": 2}], tokenizer)
    with pytest.raises(InputError, match="row 0 has TL;DR's columns, but not its content"):
        read([{**row, "info": None}], tokenizer)


def test_judged_rows_and_pairs_for_kto(tokenizer):
    rows = read([JUDGED, {**JUDGED, "completion": "3", "label": 0}], tokenizer, kto=True)
    assert [(texts(example, tokenizer), example.desirable) for example in rows] == [
        (["?1=", "12<eos>"], True),
        (["?1=", "3<eos>"], False),
    ]
    unpaired = read([PAIR], tokenizer, kto=True)
    assert [(e.row, e.desirable) for e in unpaired] == [(0, True), (0, False)]
    assert texts(unpaired[1], tokenizer) == ["?1=", "3<eos>"]


@pytest.mark.filterwarnings("ignore")
def test_the_same_tokens_as_trl(tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from .conftest import make_model

    rows = make_pairs(20)
    args = trl.DPOConfig(str(tmp_path), bf16=False, use_cpu=True, max_length=9, report_to="none")
    theirs = trl.DPOTrainer(
        make_model(), make_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset
    kept = [row for row in rows if len(tokenizer(row["prompt"])["input_ids"]) < 9]
    ours = read(kept, tokenizer, max_length=9)
    assert len(theirs) == len(ours)
    for mine, other in zip(ours, theirs, strict=True):
        room = 9 - len(mine.prompt)
        assert mine.prompt.tolist() == other["prompt_ids"]
        assert mine.completions[0].tolist() == other["chosen_ids"][:room]
        assert mine.completions[1].tolist() == other["rejected_ids"][:room]


def test_dialogues_without_a_last_turn_are_left_out(tokenizer, caplog):
    rows = [
        {"chosen": HH_HEAD, "rejected": HH_HEAD + " 4"},
        {"chosen": HH_HEAD + " 4", "rejected": HH_HEAD + " 5"},
        {"chosen": HH_HEAD + " 4", "rejected": HH_HEAD + " 5\n\nHuman: no\n\nAssistant: "},
    ]
    preferences = read(rows, tokenizer)
    assert [example.row for example in preferences] == [1] and preferences.empty == 2
    assert [example.row for example in read(rows, tokenizer, kto=True)] == [1, 1]
    with caplog.at_level(logging.WARNING):
        preferences.report()
    assert "left out 2 dialogues whose last turn is empty" in caplog.text


ASKED = {"prompt": "What is 1+1?", "chosen": " 2, of course.", "rejected": " 3, I think."}
HELD = {column: "What is 1+1?" * (column != "prompt") + text for column, text in ASKED.items()}


@pytest.mark.parametrize(
    ("row", "warning"),
    [
        (HELD, "in 2 of 3 rows the completions begin with their prompt"),
        ({**HELD, "prompt": "What is 1+1?\n"}, "in 2 of 3 rows the completions begin with their prompt"),
        ({**ASKED, "prompt": ASKED["chosen"], "chosen": ASKED["prompt"]}, "in 2 of 3 rows `chosen` looks more like"),
        ({**HELD, "prompt": HELD["chosen"], "chosen": HELD["prompt"]}, "in 2 of 3 rows `chosen` looks more like"),
        (ASKED, None),
        ({**ASKED, "rejected": ASKED["prompt"]}, None),
        ({**ASKED, "prompt": "Yes or no?", "chosen": "Yes", "rejected": "No"}, None),
        ({**ASKED, "chosen": "Which 1?", "rejected": "Which ones?"}, None),
        ({"chosen": "1+1+1+1=4", "rejected": "1+1+1+1=3"}, None),
    ],
)
@pytest.mark.parametrize("kto", [False, True])
def test_columns_that_do_not_look_like_their_names(row, warning, kto, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        read([PAIR, row, row], tokenizer, kto=kto).report()
    assert (warning in caplog.text) if warning else not caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read([PAIR, PAIR, row], tokenizer, kto=kto).report()
    assert not caplog.text, "one row may look like anything"


def test_judged_rows_that_hold_their_prompt(tokenizer, caplog):
    rows = [{"prompt": "?1=", "completion": f"?1={digit}", "label": digit == 1} for digit in range(3)]
    with caplog.at_level(logging.WARNING):
        read(rows, tokenizer, kto=True).report()
    assert "in 3 of 3 rows the completions begin with their prompt" in caplog.text


def test_labels_and_scores_from_csv(tokenizer, tmp_path):
    texts = ["True", "FALSE", "true", " false", "1", "0"]
    lines = ["prompt,completion,label", *(f"?1=,12,{text}" for text in texts)]
    (tmp_path / "judged.csv").write_text("\n".join(lines))
    rows = read(read_rows(str(tmp_path / "judged.csv")), tokenizer, kto=True)
    assert [example.desirable for example in rows] == [True, False] * 3
    (tmp_path / "scored.csv").write_text("prompt,chosen,rejected,score_chosen,score_rejected\n?1=,12,3,10,9\n")
    read(read_rows(str(tmp_path / "scored.csv")), tokenizer)


def test_what_is_counted_and_reported(tokenizer, caplog):
    rows = [PAIR, {**PAIR, "rejected": "12"}, {**PAIR, "chosen": "1234567"}]
    preferences = read(rows, tokenizer, max_length=8)
    assert (preferences.identical, preferences.truncated, len(preferences)) == (1, 1, 3)
    assert len(preferences[2].completions[0]) == 5
    with caplog.at_level(logging.WARNING):
        preferences.report()
    assert "1 of 3 pairs have the same chosen and rejected completion" in caplog.text
    assert "1 of 3 rows had a completion cut to max_length" in caplog.text


@pytest.mark.parametrize(
    ("rows", "kto", "message"),
    [
        ("file.jsonl", False, "must be a datasets.Dataset or a list of rows, got str"),
        ([], False, "is empty"),
        ([PAIR, "text"], False, "row 1 must be an object, got str"),
        ([{"prompt": "?", "chosen": "1"}], False, "must have `chosen` and `rejected`, got 'prompt', 'chosen'"),
        ([JUDGED], False, "judged rows are for loss_type kto"),
        ([{"prompt": "?", "text": "1"}], True, "must have `prompt`, `completion` and `label`, or"),
        ([{**PAIR, "chosen": ""}], False, "row 0: `chosen` is empty"),
        ([{**PAIR, "rejected": "  "}], False, "row 0: `rejected` is empty"),
        ([{**PAIR, "prompt": ""}], False, "row 0: `prompt` is empty"),
        ([{"chosen": HH_HEAD, "rejected": HH_HEAD + " 1"}], False, "every dialogue's last turn is empty"),
        ([{"prompt": HH_HEAD, "chosen": "", "rejected": " 1"}], False, "row 0: `chosen` is empty"),
        ([{**PAIR, "chosen": None}], False, "must both be text or both be messages, got NoneType and str"),
        ([{**PAIR, "prompt": [user("1")]}], False, "`prompt` is messages, so"),
        ([PAIR, CONVERSATION], False, "row 1: rows must be all text or all messages"),
        ([CONVERSATION], False, "the tokenizer has no chat template"),
        ([{**CONVERSATION, "chosen": [user("1")]}], False, "are the columns swapped"),
        ([{**CONVERSATION, "chosen": [assistant("")]}], False, "`chosen` is empty"),
        ([{**CONVERSATION, "rejected": ["3"]}], False, "a message must be"),
        ([{"chosen": "abc", "rejected": "xyz"}], False, "do not begin alike"),
        ([{**PAIR, "score_chosen": 1.0, "score_rejected": 2.0}], False, "`chosen` and `rejected` swapped"),
        ([{**JUDGED, "label": "12", "completion": True}], True, "`label` must be true or false, got '12'"),
        ([{**JUDGED, "label": "yes"}], True, "`label` must be true or false, got 'yes'"),
        ([{**PAIR, "chosen": HH_HEAD + " 4"}], False, "`chosen` begins with .*does it repeat the prompt"),
        ([{"prompt": HH_HEAD, "chosen": " 4", "rejected": HH_HEAD}], False, "`rejected` begins with .*swapped"),
        ([{**JUDGED, "completion": HH_HEAD + " 4"}], True, "`completion` begins with"),
        ([JUDGED, JUDGED], True, "kto needs rows of both labels, but every label is True"),
        ([PAIR, {**PAIR, "prompt": "?" + "1" * 30}], False, "row 1: the prompt has 31 tokens, which leaves nothing of"),
    ],
)
def test_wrong_rows_are_named(rows, kto, message, tokenizer):
    with pytest.raises(InputError, match=message) as caught:
        read(rows, tokenizer, kto=kto, max_length=20)
    assert str(caught.value).startswith("train_dataset")


@pytest.mark.parametrize("layout", [PADDED, PACKED, SHARED])
def test_batches(layout, tokenizer):
    rows = read([PAIR, {"prompt": "?12345=", "chosen": "1", "rejected": "99999"}], tokenizer)
    batch = Collator(tokenizer.pad_token_id, layout)(list(rows))
    flat = batch["input_ids"].flatten()
    assert next(iter(batch)) == "rows" and batch["lengths"].tolist() == [[3, 3, 2], [7, 2, 6]]
    assert batch["sequence"].tolist() == [0] * 3 + [1] * 2 + [2] * 2 + [3] * 6
    labels = np.concatenate([completion for row in rows for completion in row.completions])
    assert batch["labels"].tolist() == labels.tolist()
    # Behind the position that predicts a label stands the label, but for the first token of a second completion.
    behind = flat[batch["index"] + 1] == batch["labels"]
    assert behind.tolist() == (
        [True] * 3 + [False, True] + [True] * 2 + [False] + [True] * 5 if layout == SHARED else [True] * 13
    )
    if layout == SHARED:
        assert batch["input_ids"].shape == (1, 23) and batch["branches"].tolist() == batch["lengths"].tolist()
        assert batch["position_ids"].tolist() == [[*range(6), 3, 4, *range(9), *range(7, 13)]]
    elif layout == PACKED:
        assert batch["branches"].tolist() == [[3, 3], [3, 2], [7, 2], [7, 6]], "nothing is padded"
        assert batch["position_ids"].tolist() == [[*range(6), *range(5), *range(9), *range(13)]]
    else:
        assert batch["input_ids"].shape == (4, 13)


def test_ktos_mismatched_completions_are_the_previous_rows(tokenizer):
    rows = [{**JUDGED, "completion": str(number), "label": number % 2 == 0} for number in range(3)]
    batch = Collator(0, SHARED)(list(read(rows, tokenizer, kto=True)))
    digits = tokenizer("012")["input_ids"]
    end = tokenizer.eos_token_id
    expected = [x for own, other in ((0, 2), (1, 0), (2, 1)) for x in (digits[own], end, digits[other], end)]
    assert batch["labels"].tolist() == expected
    assert torch.equal(batch["desirable"], torch.tensor([True, False, True]))
