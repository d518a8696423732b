from __future__ import annotations

import collections

import pytest
from essa.config import InputError
from essa.data import Prompts, PromptSampler, split_rows

ROWS = [{"prompt": "?01+02=", "answer": "003"}, {"prompt": "?10+20=", "answer": "030"}]


def check(rows, tokenizer, room=None):
    return Prompts.check(rows, tokenizer, name="train_dataset", room=room)


def test_text_prompts(tokenizer):
    prompts = check(ROWS, tokenizer)
    assert prompts.texts == ["?01+02=", "?10+20="]
    assert not prompts.conversational
    assert prompts.columns == ["answer"]


def test_a_datasets_dataset_is_taken(tokenizer):
    import datasets

    prompts = check(datasets.Dataset.from_list(ROWS), tokenizer)
    assert prompts.rows == ROWS
    assert prompts.fingerprint() == check(ROWS, tokenizer).fingerprint()


def test_messages_go_through_the_chat_template(chat_tokenizer):
    rows = [{"prompt": [{"role": "user", "content": "01+02"}]}, {"prompt": [{"role": "assistant", "content": "1+"}]}]
    prompts = check(rows, chat_tokenizer)
    assert prompts.conversational
    assert prompts.texts == ["?01+02=", "?1+"]


def test_the_chat_templates_own_bos_is_not_doubled(chat_tokenizer):
    from tokenizers.processors import TemplateProcessing

    chat_tokenizer.bos_token = "?"
    rows = [{"prompt": [{"role": "user", "content": "01+02"}]}]
    assert check(rows, chat_tokenizer).texts == ["?01+02="]
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="? $A", special_tokens=[("?", chat_tokenizer.bos_token_id)]
    )
    (text,) = check(rows, chat_tokenizer).texts
    assert chat_tokenizer.decode(chat_tokenizer(text).input_ids).replace(" ", "") == "?01+02="


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ("data.jsonl", "must be a datasets.Dataset or a list"),
        (iter(ROWS), "must be a datasets.Dataset or a list"),
        ([{"question": "x"}], "row 0 has no `prompt` column, only 'question'"),
        ([ROWS[0], {"prompt": 7}], "row 1: `prompt` must be text or a list of messages, got int 7"),
        ([{"prompt": ""}], "row 0: `prompt` is empty"),
        ([{"prompt": None}], "row 0: `prompt` must be text"),
        ([{"prompt": []}], "row 0: `prompt` must be text or a list"),
        ([{"prompt": ["hello"]}], "row 0: a message must be"),
        ([{"prompt": [{"role": "user"}]}], "row 0: a message must be"),
        ([ROWS[0], {"prompt": [{"role": "user", "content": "x"}]}], "row 1: prompts must be all text or all messages"),
        ([ROWS[0], {"prompt": "?1+1="}], "row 1 lacks the column 'answer'"),
        (["?1+1="], "row 0 must be an object"),
        ([ROWS[0], {**ROWS[0], "prompt": "?\ud800="}], r"row 1: half a surrogate pair, '\\ud800', is no character"),
    ],
)
def test_wrong_rows_are_named(tokenizer, rows, message):
    with pytest.raises(InputError, match=message) as caught:
        check(rows, tokenizer)
    assert "train_dataset" in str(caught.value)


def test_messages_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        check([{"prompt": [{"role": "user", "content": "x"}]}], tokenizer)


def test_a_prompt_longer_than_the_context_is_named(tokenizer):
    check(ROWS, tokenizer, room=7)
    with pytest.raises(InputError, match="row 1: the prompt has 7 tokens, but only 6 fit"):
        check([{"prompt": "?1+1="}, {"prompt": "?10+20="}], tokenizer, room=6)
    with pytest.raises(InputError, match="max_new_tokens leaves no room"):
        check(ROWS, tokenizer, room=0)


def test_the_fingerprint_sees_every_cell(tokenizer):
    prints = {
        check(rows, tokenizer).fingerprint()["sha256"]
        for rows in (ROWS, ROWS[::-1], ROWS[:1], [{**ROWS[0], "answer": "004"}, ROWS[1]])
    }
    assert len(prints) == 4


def test_every_epoch_sees_every_prompt_once_in_an_order_of_its_own():
    sampler = PromptSampler(size=10, per_generation=4, seed=5)
    drawn = [index for generation in range(10) for index in sampler.indices(generation)]
    epochs = [drawn[start : start + 10] for start in range(0, 40, 10)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sampler.epoch(5) == 2.0


def test_draws_depend_on_the_seed_and_the_generation_alone():
    forward = [PromptSampler(10, 4, 5).indices(generation) for generation in range(6)]
    sampler = PromptSampler(10, 4, 5)
    assert [sampler.indices(generation) for generation in reversed(range(6))] == forward[::-1]
    assert [PromptSampler(10, 4, 6).indices(generation) for generation in range(6)] != forward


def test_more_prompts_than_there_are_is_refused():
    with pytest.raises(InputError, match="prompts_per_generation must be at most the 10"):
        PromptSampler(10, 11, 0)


def test_split_rows():
    rows = [{"prompt": str(i)} for i in range(20)]
    train, evaluation = split_rows(rows, 0.25, seed=1)
    assert len(evaluation) == 5
    counts = collections.Counter(row["prompt"] for row in train + evaluation)
    assert set(counts) == {row["prompt"] for row in rows} and set(counts.values()) == {1}
    assert split_rows(rows, 0.25, seed=1) == (train, evaluation)
    assert split_rows(rows, 0.25, seed=2) != (train, evaluation)
    for fraction in (0.0, 1.0, -0.5):
        with pytest.raises(InputError, match="eval_split"):
            split_rows(rows, fraction, seed=1)
    with pytest.raises(InputError, match="leaves nothing to train on"):
        split_rows(rows[:1], 0.5, seed=1)
