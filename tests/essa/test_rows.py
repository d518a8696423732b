"""Rows of every kind of file, and of datasets laid out as the hub has them."""

from __future__ import annotations

import gzip
import json

import datasets
import pytest
from essa import rows as rows_module
from essa.cli import app
from essa.config import InputError
from essa.data import DataSettings
from essa.demo.warm_start import BASE_MODEL
from essa.rows import CONVERTED, read_rows
from essa.trdpo.data import read_preferences
from typer.testing import CliRunner

ROWS = [{"prompt": "?01+02=", "answer": "003"}, {"prompt": "?10+20=", "answer": "030"}]


def test_every_file_type_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = {
        "jsonl": "".join(json.dumps(row) + "\n\n" for row in ROWS),
        "json": json.dumps(ROWS),
        "csv": "prompt,answer\n?01+02=,003\n?10+20=,030\n",
    }
    for suffix, text in texts.items():
        (tmp_path / f"a.{suffix}").write_text(text)
        (tmp_path / f"a.{suffix}.gz").write_bytes(gzip.compress(text.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    files = list(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert read_rows(str(file)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', "line 2: not JSON"),
        ("a.json", "{", "not JSON"),
        ("a.json", '[{"answer": ' + "1" * 5000 + "}]", "not JSON"),
        ("a.jsonl", '{"answer": ' + "1" * 5000 + "}", "line 1: not JSON"),
        ("a.json", '{"prompt": "x"}', "must hold a list"),
        ("a.parquet", "PAR", "not a Parquet file"),
        ("a.jsonl", "", "is empty"),
        ("a.csv", "prompt\n", "is empty"),
        ("a.txt", "hello", "unknown file type"),
        ("a.txt.gz", "hello", "unknown file type"),
        ("a.jsonl", b'{"prompt": "\xff"}', "cannot be read: 'utf-8' codec can't decode"),
        ("a.jsonl.gz", '{"prompt": "x"}', "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(json.dumps(ROWS[0]).encode())[:-9], "cannot be read: Compressed file ended"),
        ("a.jsonl.gz", gzip.compress(b"\n"), "is empty"),
        ("a.csv", "prompt,answer\nx,1\ny\n", "row 1: its fields are not those of the header"),
        ("a.csv", "prompt,answer\nx,1,2\n", "row 0: its fields are not those of the header"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_rows(str(tmp_path / name), argument="eval_dataset_name")
    assert "eval_dataset_name" in str(caught.value) and name in str(caught.value)


def test_what_spreadsheets_write_is_read(tmp_path):
    long = "7" * 200_000
    (tmp_path / "a.csv").write_text(f"prompt,answer\n?01+02=,{long}\n", encoding="utf-8-sig")
    assert read_rows(str(tmp_path / "a.csv")) == [{"prompt": "?01+02=", "answer": long}]


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for name in ("missing.jsonl", "missing.jsonl.gz"):
        with pytest.raises(InputError, match="no such file"):
            read_rows(str(tmp_path / name))
    with pytest.raises(InputError, match="is a folder"):
        read_rows(str(tmp_path))


def test_a_file_has_no_configuration(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    for option in ({"config": "comparisons"}, {"data_dir": "harmless-base"}):
        with pytest.raises(InputError, match="is a file: only a dataset on the hub"):
            read_rows(str(tmp_path / "a.json"), **option)


HARMLESS = [
    ("\n\nHuman: Where is the key?\n\nAssistant: Which one?\n\nHuman: Ours.\n\nAssistant:", " Under the mat.", " No."),
    ("\n\nHuman: Sing!\n\nAssistant:", "", " La la."),
    ("\n\nHuman: Sing again!\n\nAssistant:", " La.", " \n"),
]
TLDR = {
    "info": {
        "id": "t3_1",
        "post": "I lost my key.",
        "title": "Key",
        "subreddit": "tales",
        "site": None,
        "article": None,
    },
    "summaries": [
        {"text": " A key was lost.", "policy": "sup1", "note": None},
        {"text": " There are keys.", "policy": "sup2", "note": "vague"},
    ],
    "choice": 0,
    "worker": "w1",
    "batch": "batch3",
    "split": "train",
    "extra": {"confidence": None},
}
ARTICLE = {
    **TLDR,
    "info": {**dict.fromkeys(TLDR["info"]), "id": "c1", "article": "A key was found.", "site": "a paper"},
    "choice": 1,
}

text, whole = datasets.Value("string"), datasets.Value("int32")
COMPARISONS = datasets.Features(
    {
        "info": dict.fromkeys(TLDR["info"], text),
        "summaries": datasets.List(dict.fromkeys(TLDR["summaries"][0], text)),
        "choice": whole,
        **dict.fromkeys(("worker", "batch", "split"), text),
        "extra": {"confidence": whole},
    }
)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`load_dataset`, with folders laid out as on the hub in its place. What was asked for."""
    for part in ("harmless-base", "helpful-base"):
        (tmp_path / "hub/Anthropic/hh-rlhf" / part).mkdir(parents=True)
        for split in ("train", "test"):
            dialogues = [
                {"chosen": head + a, "rejected": head + b} for head, a, b in HARMLESS[: 3 if split == "test" else 1]
            ]
            text = "".join(json.dumps(row).replace("key", part) + "\n" for row in dialogues)
            file = tmp_path / "hub/Anthropic/hh-rlhf" / part / f"{split}.jsonl.gz"
            file.write_bytes(gzip.compress(text.encode()))
    for part, split, rows in (("comparisons", "train", [TLDR]), ("comparisons", "validation", [TLDR, ARTICLE])):
        folder = tmp_path / "hub/openai/summarize_from_feedback" / part / split
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(rows, features=COMPARISONS).to_parquet(folder / "0000.parquet")
    real, asked = datasets.load_dataset, []

    def load(name, config=None, *, data_dir=None, split=None, revision=None):
        asked.append((name, config, data_dir, split, revision))
        if name.startswith("openai") and revision != CONVERTED:
            raise RuntimeError("Dataset scripts are no longer supported, but found summarize_from_feedback.py")
        folder = str(tmp_path / "hub" / name)
        return real(folder, config, data_dir=data_dir, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(rows_module, "reach_hub", lambda name: None)
    return asked


def test_a_part_of_anthropics_dialogues(hub, tokenizer):
    rows = read_rows("Anthropic/hh-rlhf", split="test", data_dir="harmless-base")
    assert [row["chosen"].count("harmless-base") for row in rows] == [1, 0, 0] and list(rows[0]) == [
        "chosen",
        "rejected",
    ]
    preferences = read_preferences(rows, tokenizer, name="train_dataset", kto=False, max_length=None)
    assert (len(preferences), preferences.empty) == (1, 2)
    assert len(read_rows("Anthropic/hh-rlhf")) == 2, "of both parts"


def test_openais_comparisons_whose_script_is_not_run(hub, tokenizer):
    rows = read_rows("openai/summarize_from_feedback", split="validation", config="comparisons")
    assert rows[0] == TLDR
    preferences = read_preferences(rows, tokenizer, name="train_dataset", kto=False, max_length=None)
    heads = ["SUBREDDIT: r/tales\n\nTITLE: Key\n\nPOST: I lost my key.\n\nTL;DR:", "POST: A key was found.\n\nTL;DR:"]
    assert [len(example.prompt) for example in preferences] == [len(tokenizer(head)["input_ids"]) for head in heads]
    with pytest.raises(InputError, match=r"\(split 'train'\): Dataset scripts are no longer supported"):
        read_rows("openai/summarize_from_feedback")
    with pytest.raises(InputError, match=r"\(split 'train', configuration 'no'\)"):
        read_rows("openai/summarize_from_feedback", config="no")


def test_the_same_dataset_is_evaluated_on_in_the_same_part(hub):
    settings = DataSettings(data_dir="harmless-base", eval_dataset_name="Anthropic/hh-rlhf")
    train, evaluation = settings.read("Anthropic/hh-rlhf", seed=0)
    assert len(train) == 1 and len(evaluation) == 3 and "harmless-base" in evaluation[0]["chosen"]
    other = DataSettings(
        data_dir="harmless-base",
        eval_dataset_name="openai/summarize_from_feedback",
        eval_dataset_split="train",
        eval_dataset_config="comparisons",
    )
    assert other.read("Anthropic/hh-rlhf", seed=0)[1] == [TLDR]
    apart = DataSettings(data_dir="harmless-base", eval_dataset_name="Anthropic/hh-rlhf", eval_data_dir="helpful-base")
    assert "helpful-base" in apart.read("Anthropic/hh-rlhf", seed=0)[1][0]["chosen"]


@pytest.mark.parametrize("command", ["align", "eval", "sft", "trdpo"])
def test_every_command_names_a_part(hub, tmp_path, command):
    arguments = [command, "--model_name_or_path", str(BASE_MODEL), "--dataset_name", "Anthropic/hh-rlhf"]
    arguments += ["--dataset_config", "default", "--data_dir", "helpful-base", "--dataset_split", "no such split"]
    arguments += ["--reward", "math"] if command in ("align", "eval") else []
    arguments += ["--output_dir", str(tmp_path / "run")] if command != "eval" else []
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "configuration 'default', data_dir 'helpful-base'" in result.stderr, result.output
    assert hub == [("Anthropic/hh-rlhf", "default", "helpful-base", "no such split", None)]
