"""A run that is killed, fills the disk, loses the end of its history or meets bad luck goes on where it was, to the same bits."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from essa import chunks
from essa.checkpoint import HISTORY_FILE, Run, SaveError
from essa.config import InputError
from essa.rewards import RewardError
from safetensors.torch import load_file
from transformers import TrainerCallback

TINY = {"population_size": 4, "prompts_per_generation": 2, "strategy": "es-per-completion", "eval_dataset": None}


def adapter(folder) -> bytes:
    return Path(folder, "adapter", "adapter_model.safetensors").read_bytes()


def generations(folder) -> int:
    """How many the history holds; reading it also verifies it."""
    return sum("rewards" in record for record in Run.read(folder).records)


class Report(TrainerCallback):
    """Writes a byte to a pipe after each generation."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.writing, b".")

    def drain(self) -> int:
        count = 0
        while select.select([self.reading], [], [], 0)[0]:
            count += len(os.read(self.reading, 65536))
        return count


def in_a_child(trainer, resume: bool) -> int:
    """`trainer.train` in a fork, whose end is nobody else's. Returns its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            trainer.train(resume_from_checkpoint=resume)
            status = 0
        finally:
            os._exit(status)
    return child


@pytest.mark.parametrize("kills", [15, pytest.param(220, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing_but_the_generation_in_flight(make_trainer, one_thread, seed, kills):
    """The adapter is written after every generation, so kills fall into its writing too."""
    rng = random.Random(seed)
    settings = {**TINY, "generations": 6 * kills, "save_steps": 1}
    whole = make_trainer("whole", **settings)
    whole.train()
    report = Report()
    trainer = make_trainer("killed", **settings, callbacks=[report])
    folder = Path(trainer.args.output_dir)
    killed = told = 0
    started = time.monotonic()
    while killed < kills:
        child = in_a_child(trainer, resume=(folder / "run.json").exists())
        # The first moments after the resumed search's first generation, or while it is being resumed.
        select.select([report.reading], [], [], rng.choice([0.02, 5.0]))
        time.sleep(rng.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        told += report.drain()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        killed += 1
        if (folder / "run.json").exists():
            done = generations(folder)
            assert done >= told, "a generation that was told is in the history"
            told = done
        if (folder / "adapter").exists():
            load_file(folder / "adapter" / "adapter_model.safetensors")
    print(f"{killed} kills in {time.monotonic() - started:.1f} s, {told} generations")
    trainer.train(resume_from_checkpoint=True)
    assert killed == kills
    assert adapter(folder) == adapter(whole.args.output_dir)
    assert generations(folder) == settings["generations"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 48 KiB, or None where this process may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", folder], capture_output=True, check=False
    )
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(make_trainer, small_disk):
    if small_disk is None:
        pytest.skip("may not mount a file system here")
    settings = {**TINY, "generations": 4}
    whole = make_trainer("whole", **settings)
    whole.train()
    filler = small_disk / "filler"
    trainer = make_trainer("disk/run", **settings)

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

    trainer.callbacks.append(Fill())
    with pytest.raises(SaveError, match=r"cannot be written: .*No space left(.|\n)*Stopped after generation \d of 4"):
        trainer.train()
    assert generations(trainer.args.output_dir) >= 2
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    make_trainer("disk/run", **settings).train(resume_from_checkpoint=True)
    assert adapter(trainer.args.output_dir) == adapter(whole.args.output_dir)


def test_a_write_that_is_cut_short_leaves_a_history_that_can_be_resumed(make_trainer, one_thread):
    """The same on any system: files may not grow beyond a limit, which a line of the history meets halfway."""
    settings = {**TINY, "generations": 4}
    whole = make_trainer("whole", **settings)
    whole.train()
    trainer = make_trainer(**settings)
    child = os.fork()
    if child == 0:
        line = len(Path(whole.args.output_dir, HISTORY_FILE).read_bytes()) // 4
        identity = len(Path(whole.args.output_dir, "run.json").read_bytes())
        limit = 2 * line + line // 2
        status = 1
        try:
            trainer._open_run(None).close()
            assert identity
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            trainer._open_run = lambda resume: _opened_as_it_is(trainer)
            trainer.train(resume_from_checkpoint=True)
        except SaveError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert generations(trainer.args.output_dir) == 2
    assert not Path(trainer.args.output_dir, HISTORY_FILE).read_bytes().endswith(b"\n"), "the third line is torn"
    trainer.train(resume_from_checkpoint=True)
    assert adapter(trainer.args.output_dir) == adapter(whole.args.output_dir)


def _opened_as_it_is(trainer) -> Run:
    """The run, without writing its description anew, which the limit would not allow."""
    run = Run.read(trainer.args.output_dir)
    run._open()
    return run


def test_a_history_without_its_end_is_resumed_and_an_edited_one_is_refused(make_trainer, seed):
    settings = {**TINY, "generations": 5}
    trainer = make_trainer(**settings)
    trainer.train()
    expected = adapter(trainer.args.output_dir)
    path = Path(trainer.args.output_dir, HISTORY_FILE)
    whole = path.read_bytes()
    rng = random.Random(seed)
    for length in (0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(3))):
        path.write_bytes(whole[:length])
        make_trainer(**settings).train(resume_from_checkpoint=True)
        assert adapter(trainer.args.output_dir) == expected
    lines = whole.splitlines(keepends=True)
    place = rng.randrange(len(whole) - 1)
    edited = bytearray(whole)
    edited[place] = edited[place] ^ 1
    for altered in (bytes(edited), b"".join(lines[1:]), lines[0] + lines[2] + lines[1], whole + lines[0]):
        path.write_bytes(altered)
        with pytest.raises(InputError, match=r"damaged|altered"):
            make_trainer(**settings).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_reward_that_hangs_is_named(make_trainer, stubborn):
    def slow(completions, answer, **kwargs):
        if slow.calls == 5:
            while True:
                try:
                    time.sleep(60)
                except Exception:
                    if not stubborn:
                        raise
        slow.calls += 1
        return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]

    slow.calls = 0
    settings = {**TINY, "generations": 2, "reward_timeout": 0.2}
    trainer = make_trainer(**settings, reward_funcs=slow)
    with pytest.raises(
        RewardError, match=r"took longer than reward_timeout, 0.2 s, on member 1, prompt(.|\n)*Stopped after"
    ):
        trainer.train()
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    slow.calls = 100
    trainer.train(resume_from_checkpoint=True)
    slow.calls = 100
    whole = make_trainer("whole", **{**settings, "reward_timeout": None}, reward_funcs=slow)
    whole.train()
    assert adapter(trainer.args.output_dir) == adapter(whole.args.output_dir)


def test_a_chunk_that_does_not_fit_is_halved_and_the_run_goes_on(make_trainer, monkeypatch, caplog):
    settings = {"generations": 2, "row_budget": 13, "eval_dataset": None}
    whole = make_trainer("whole", **settings)
    whole.train()
    generate = chunks.generate

    def cramped(*args, rows, generation, **kwargs):
        if generation == 1 and len(rows) > 4:
            raise (
                torch.OutOfMemoryError("CUDA out of memory")
                if len(rows) > 6
                else RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            )
        return generate(*args, rows=rows, generation=generation, **kwargs)

    monkeypatch.setattr(chunks, "generate", cramped)
    trainer = make_trainer(**settings)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "generation 1: chunks of row_budget 13 did not fit into memory and were halved, 3 times" in caplog.text
    assert adapter(trainer.args.output_dir) == adapter(whole.args.output_dir)
    monkeypatch.setattr(chunks, "generate", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        make_trainer("hopeless", **settings).train()


def test_row_budget_auto_is_measured_once_and_kept(make_trainer, capsys):
    settings = {**TINY, "generations": 2, "row_budget": "auto", "progress": True}
    trainer = make_trainer(**settings)
    assert "row_budget auto: " in capsys.readouterr().err
    chosen = trainer.args.row_budget
    assert chosen in (1, 2, 4)
    trainer.train()
    assert Run.read(trainer.args.output_dir).identity["settings"]["row_budget"] == chosen
    capsys.readouterr()
    again = make_trainer(**{**settings, "generations": 3})
    assert "row_budget auto" not in capsys.readouterr().err and again.args.row_budget == chosen
    again.train(resume_from_checkpoint=True)
    with pytest.raises(InputError, match="row_budget must be a number with num_workers"):
        make_trainer("other", row_budget="auto", num_workers=2)
