from __future__ import annotations

import html.parser
import re

import pytest
from essa.checkpoint import Run
from essa.report import Curve, Table, run_curves, write_report


@pytest.fixture
def run(make_trainer, pictures):
    trainer = make_trainer("a <run>", strategy="cma", generations=3, eval_steps=1)
    trainer.train()
    return Run.read(trainer.args.output_dir)


class Page(html.parser.HTMLParser):
    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.links = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_self_contained(run):
    source = (run.directory / "report.html").read_text()
    page = Page(source)
    assert page.open == []
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)", source) and "<script" not in source
    text = " ".join(page.text)
    assert "a <run>" in text
    for fact in ("population_size", "exact_match", "samples per second", "noise_version"):
        assert fact in text
    assert "currentColor" in source and "prefers-color-scheme: dark" in source
    assert "#010203" not in source
    assert (run.directory / "report.png").read_bytes().startswith(b"\x89PNG")


def test_curves_count_what_was_sampled(run):
    evaluation, mean, best = run_curves(run)
    assert evaluation.name == "evaluation" and list(evaluation.samples) == [0, 64, 128, 192]
    assert list(mean.samples) == [64, 128, 192]
    assert all(b >= m for b, m in zip(best.values, mean.values, strict=True))
    assert list(evaluation.seconds) == sorted(evaluation.seconds) and evaluation.seconds[0] == 0
    assert evaluation.values == [record["evaluation"]["reward"] for record in run.records if "evaluation" in record]


def test_rivals_and_tables_can_be_added(run):
    rivals = [Curve("rival & co", [10, 20], [1, 2], [0.1, 0.9]), Curve("control", [], [], [0.4], "level")]
    path = write_report(run.directory, title="Demo", curves=rivals, tables=[Table("Result", [("control", 0.4)])])
    text = " ".join(Page(path.read_text()).text)
    for words in ("Demo", "rival & co", "control", "Result"):
        assert words in text


def test_a_run_that_has_only_begun(tmp_path, run):
    begun = Run.create(tmp_path / "begun", run.identity, run.about)
    begun.close()
    assert "samples" in write_report(begun.directory).read_text()
