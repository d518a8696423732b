from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from essa.checkpoint import HISTORY_FILE, RUN_FILE, Run, write_folder
from essa.config import InputError
from hypothesis import given, settings
from hypothesis import strategies as st

IDENTITY = {"settings": {"sigma": 0.2, "seed": 3}, "noise_version": 1}


def new_run(folder, records=3):
    run = Run.create(folder, IDENTITY, {"about": "a test"})
    for generation in range(records):
        run.append({"generation": generation, "rewards": [[0.1 * generation, 1 / 3]]})
    run.close()
    return run


def test_records_come_back_exactly(tmp_path):
    written = new_run(tmp_path / "run").records
    read = Run.read(tmp_path / "run")
    assert read.records == written
    assert read.identity == IDENTITY
    assert read.about == {"about": "a test"}


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path):
    new_run(tmp_path, records=2)
    run = Run.resume(tmp_path, IDENTITY, {"generations": 3})
    run.append({"generation": 2})
    run.close()
    assert Run.read(tmp_path).about == {"about": "a test", "generations": 3}
    assert [record["generation"] for record in Run.read(tmp_path).records] == [0, 1, 2]


def test_a_folder_with_a_run_is_refused(tmp_path):
    new_run(tmp_path)
    before = (tmp_path / HISTORY_FILE).read_bytes()
    with pytest.raises(InputError, match="already holds a run"):
        Run.create(tmp_path, IDENTITY, {})
    assert (tmp_path / HISTORY_FILE).read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        Run.create(tmp_path / "run", IDENTITY, {})


def test_other_settings_are_named(tmp_path):
    new_run(tmp_path)
    with pytest.raises(InputError, match=r"settings sigma was 0.2, now 0.3"):
        Run.resume(tmp_path, {**IDENTITY, "settings": {"sigma": 0.3, "seed": 3}}, {})


def test_a_run_in_use_is_refused(tmp_path):
    new_run(tmp_path)
    run = Run.resume(tmp_path, IDENTITY, {})
    with pytest.raises(InputError, match="in use by another process"):
        Run.resume(tmp_path, IDENTITY, {})
    run.close()
    Run.resume(tmp_path, IDENTITY, {}).close()


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(min_value=0))
def test_a_history_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    new_run(folder)
    content = (folder / HISTORY_FILE).read_bytes()
    cut %= len(content) + 1
    (folder / HISTORY_FILE).write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    run = Run.resume(folder, IDENTITY, {})
    assert [record["generation"] for record in run.records] == list(range(whole))
    for generation in range(whole, 3):
        run.append({"generation": generation, "rewards": [[0.1 * generation, 1 / 3]]})
    run.close()
    assert (folder / HISTORY_FILE).read_bytes() == content


@settings(max_examples=60, deadline=None)
@given(place=st.integers(min_value=0), byte=st.integers(0, 255))
def test_a_changed_byte_is_noticed(tmp_path_factory, place, byte):
    folder = tmp_path_factory.mktemp("run")
    records = new_run(folder).records
    content = bytearray((folder / HISTORY_FILE).read_bytes())
    place %= len(content) - 1
    unchanged = content[place] == byte
    content[place] = byte
    (folder / HISTORY_FILE).write_bytes(content)
    try:
        assert Run.read(folder).records == records
        assert unchanged or byte == ord(" ")
    except InputError as error:
        assert HISTORY_FILE in str(error) and "line" in str(error)
        assert not unchanged


def test_lines_in_another_order_or_of_another_run_are_noticed(tmp_path):
    new_run(tmp_path / "a")
    history = tmp_path / "a" / HISTORY_FILE
    lines = history.read_bytes().splitlines(keepends=True)
    history.write_bytes(b"".join([lines[1], lines[0], lines[2]]))
    with pytest.raises(InputError, match="line 1 was altered or belongs to another run"):
        Run.read(tmp_path / "a")

    Run.create(tmp_path / "b", {**IDENTITY, "noise_version": 2}, {}).close()
    (tmp_path / "b" / HISTORY_FILE).write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="line 1 was altered or belongs to another run"):
        Run.read(tmp_path / "b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged"),
        ('{"format": 1, "identity"', "damaged"),
        ('{"hello": "world"}', "does not describe a run"),
        ("[]", "does not describe a run"),
        ('{"format": 1, "digest": "", "identity": {}, "about": [1]}', "does not describe a run"),
        ('{"format": 1, "digest": "", "identity": {}, "about": 7}', "does not describe a run"),
        ('{"format": 1, "digest": "", "identity": 7, "about": {}}', "does not describe a run"),
    ],
)
def test_a_broken_or_foreign_run_file_is_named(tmp_path, content, message):
    new_run(tmp_path)
    (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(InputError, match=message):
        Run.read(tmp_path)


def test_an_altered_identity_or_a_newer_format_is_named(tmp_path):
    new_run(tmp_path)
    content = json.loads((tmp_path / RUN_FILE).read_text())
    (tmp_path / RUN_FILE).write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(InputError, match="format 2"):
        Run.read(tmp_path)
    content["identity"]["settings"]["sigma"] = 0.25
    (tmp_path / RUN_FILE).write_text(json.dumps(content))
    with pytest.raises(InputError, match="was altered"):
        Run.read(tmp_path)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(InputError, match=r"no run\.json"):
        Run.read(tmp_path)


def test_numbers_that_json_has_no_word_for_are_refused(tmp_path):
    run = Run.create(tmp_path, IDENTITY, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        run.append({"reward": float("nan")})
    run.append({"reward": 1.0})
    run.close()
    assert Run.read(tmp_path).records == [{"reward": 1.0}]


WRITER = """
import sys
from essa.checkpoint import Run
run = Run.create(sys.argv[1], {"a": 1}, {})
for generation in range(10**9):
    run.append({"generation": generation, "rewards": [0.5] * 2000})
"""


def test_kill_minus_nine_while_writing(tmp_path):
    for delay in (0.0, 0.01, 0.05):
        folder = tmp_path / str(delay)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)])
        while not (folder / HISTORY_FILE).exists():
            assert writer.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        run = Run.resume(folder, {"a": 1}, {})
        assert [record["generation"] for record in run.records] == list(range(len(run.records)))
        run.append({"generation": len(run.records)})
        run.close()
        assert len(Run.read(folder).records) == len(run.records)


def test_write_folder_leaves_nothing_when_filling_fails(tmp_path):
    target = tmp_path / "runs" / "adapter"

    def fail(fresh):
        (fresh / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, fail)
    assert list(target.parent.iterdir()) == []
    target.mkdir()
    write_folder(target, lambda fresh: (fresh / "weights").write_text("whole") and None)
    assert (target / "weights").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]
