"""Runs that are killed, fill the disk, or find a checkpoint damaged: nothing corrupt, and the same bits in the end."""

from __future__ import annotations

import logging
import os
import pickle
import random
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from essa.checkpoint import SaveError, alone_in, write_folder
from essa.cli import app
from essa.config import InputError
from essa.demo.task import write_jsonl
from essa.demo.warm_start import BASE_MODEL
from essa.trdpo import TRDPOConfig, TRDPOTrainer
from essa.trdpo import command as essa_command
from essa.trdpo.checkpoints import damage, last_sound_checkpoint, whole_checkpoints
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer
from typer.testing import CliRunner

from .conftest import make_model, make_pairs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
SMALL = ["--max_steps", "6", "--per_device_train_batch_size", "4", "--ref_model_sync_steps", "2", "--device", "cpu"]
SMALL += ["--learning_rate", "1e-3", "--save_steps", "3", "--lora_r", "4"]


def essa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def command(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", make_pairs(30))
    return ["trdpo", "--model_name_or_path", BASE_MODEL, "--dataset_name", tmp_path / "pairs.jsonl", *SMALL]


def in_a_child(act) -> int:
    """`act` in a fork, whose end is nobody else's: its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def adapter(folder) -> bytes:
    return Path(folder, "adapter", "adapter_model.safetensors").read_bytes()


def kill_in(monkeypatch, owner, method):
    """The process dies where this method is called."""
    monkeypatch.setattr(owner, method, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("resume", [False, True], ids=["anew", "resumed"])
@pytest.mark.parametrize(
    ("owner", "method"),
    [(TRDPOTrainer, "training_step"), (Trainer, "_save_optimizer_and_scheduler")],
    ids=["before", "within"],
)
def test_a_run_that_is_killed_before_its_first_checkpoint_starts_over(
    command, tmp_path, monkeypatch, owner, method, resume
):
    assert essa(*command, "--output_dir", tmp_path / "whole").exit_code == 0
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        kill_in(patched, owner, method)
        status = in_a_child(lambda: essa(*command, "--output_dir", run))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (run / "trdpo.json").exists() and not whole_checkpoints(run)
    assert (run / "checkpoint-3").exists() == (method != "training_step")
    again = ["trdpo", "--resume_from_checkpoint", run] if resume else [*command, "--output_dir", run]
    result = essa(*again)
    assert result.exit_code == 0 and "ended before its first checkpoint: it starts over" in result.output
    assert adapter(run) == adapter(tmp_path / "whole")


def test_a_second_process_is_kept_out(command, tmp_path):
    (tmp_path / "run").mkdir()
    with alone_in(tmp_path / "run"):
        result = essa(*command, "--output_dir", tmp_path / "run")
    assert result.exit_code == 2 and "is in use by another process" in result.stderr
    assert not (tmp_path / "run/trdpo.json").exists()


@pytest.mark.parametrize(("was", "resume"), [("cut short", False), ("cut short", True), ("not there", False)])
def test_what_another_process_saved_meanwhile_is_kept(command, finished, tmp_path, monkeypatch, was, resume):
    """The folder is looked at before the model is loaded; meanwhile another process trains there, and ends."""
    run, loads = tmp_path / "run", essa_command.load_base
    if was == "cut short":
        (run / "checkpoint-3").mkdir(parents=True)
        shutil.copy(finished / "trdpo.json", run)

    def load(*arguments, **options):
        shutil.copytree(finished, run, dirs_exist_ok=True)
        shutil.rmtree(run / "adapter")
        return loads(*arguments, **options)

    monkeypatch.setattr(essa_command, "load_base", load)
    result = essa(*(["trdpo", "--resume_from_checkpoint", run] if resume else [*command, "--output_dir", run]))
    assert result.exit_code == 2 and "already holds a run; resume it with" in result.stderr, result.output
    assert [path.name for path in whole_checkpoints(run)] == ["checkpoint-3", "checkpoint-6"]
    assert last_sound_checkpoint(run).name == "checkpoint-6"
    assert (run / "trdpo.json").read_bytes() == (finished / "trdpo.json").read_bytes()


def test_a_run_that_starts_over_removes_only_its_own_parts(command, tmp_path, finished):
    run = tmp_path / "run"
    for name in ("checkpoint-3", "checkpoint-best", "checkpoint-best-4"):
        (run / name).mkdir(parents=True)
        (run / name / "part").touch()
    (run / "checkpoint-best-4" / "trainer_state.json").write_text("{}")
    (run / "checkpoint-notes.txt").write_text("mine")
    (run / "checkpoint-9").write_text("a file")
    shutil.copy(finished / "trdpo.json", run)
    assert not whole_checkpoints(run)
    result = essa(*command, "--output_dir", run)
    assert result.exit_code == 0 and "it starts over" in result.output, result.output
    assert not (run / "checkpoint-3/part").exists() and (run / "checkpoint-9").read_text() == "a file"
    assert (run / "checkpoint-best/part").exists() and (run / "checkpoint-best-4/part").exists()
    assert (run / "checkpoint-notes.txt").read_text() == "mine"


def test_of_several_processes_only_the_one_that_saves_removes_parts(command, tmp_path, finished, monkeypatch):
    run, waited = tmp_path / "run", []
    (run / "checkpoint-3").mkdir(parents=True)
    shutil.copy(finished / "trdpo.json", run)
    monkeypatch.setattr(TRDPOConfig, "should_save", False)
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda _: waited.append((run / "checkpoint-3").exists()))
    monkeypatch.setattr(TRDPOTrainer, "train", lambda *_, **__: waited.append("trains"))
    before = (run / "trdpo.json").stat().st_mtime_ns
    assert essa(*command, "--no_report", "--output_dir", run).exit_code == 0
    assert waited == [True, "trains"] and (run / "trdpo.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("full_at", "told"),
    [
        ("checkpoint-3", "before the first checkpoint (save_steps 3): start it anew"),
        ("checkpoint-6", "Stopped after step 6; resume with `essa trdpo --resume_from_checkpoint"),
        ("adapter", "Stopped after step 6; resume with `essa trdpo --resume_from_checkpoint"),
    ],
)
def test_a_full_disk_ends_the_run_and_space_lets_it_go_on(command, tmp_path, monkeypatch, full_at, told):
    """Files may not grow beyond a limit, which the adapter meets halfway."""
    assert essa(*command, "--output_dir", tmp_path / "whole").exit_code == 0
    run, save_model = tmp_path / "run", TRDPOTrainer.save_model

    def save(self, output_dir=None, **options):
        if Path(output_dir).name == full_at:
            limit = len(adapter(tmp_path / "whole")) // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save_model(self, output_dir, **options)

    def act():
        result = essa(*command, "--output_dir", run)
        (tmp_path / "told").write_text(f"{result.exit_code}\n{result.stderr}")

    with monkeypatch.context() as patched:
        patched.setattr(TRDPOTrainer, "save_model", save)
        assert in_a_child(act) == 0
    code, _, said = (tmp_path / "told").read_text().partition("\n")
    assert code == "2" and "cannot be written: " in said and told in said, said
    assert not (run / "adapter").exists() and not [path for path in whole_checkpoints(run) if damage(path)]
    assert (run / full_at).exists() is False
    again = ["trdpo", "--resume_from_checkpoint", run] if "resume" in told else [*command, "--output_dir", run]
    assert essa(*again).exit_code == 0
    assert adapter(run) == adapter(tmp_path / "whole")


def test_a_folder_that_is_there_makes_place_only_for_a_whole_one(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()

    def fail(fresh):
        raise SaveError("full")

    with pytest.raises(SaveError):
        write_folder(tmp_path / "adapter", fail)
    assert (tmp_path / "adapter" / "old").exists()
    write_folder(tmp_path / "adapter", lambda fresh: (fresh / "new").touch())
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Another byte, in the middle of an archive's largest part."""
    with zipfile.ZipFile(path) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[part.header_offset + 200 + part.file_size // 2] ^= 1
    path.write_bytes(content)


def spoil(path):
    weights = load_file(path)
    next(iter(weights.values())).fill_(torch.nan)
    save_file(weights, path)


DAMAGE = {
    "adapter_model.safetensors": cut,
    "reference.safetensors": cut,
    "optimizer.pt": cut,
    "scheduler.pt": cut,
    "rng_state.pth": cut,
    "trainer_state.json": cut,
    "reference.json": lambda path: path.write_text("[]"),
}
MORE = [("trainer_state.json", lambda path: path.write_text("[]")), ("optimizer.pt", flip)]
MORE += [("adapter_model.safetensors", spoil), ("rng_state.pth", lambda path: path.write_bytes(b""))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints at steps 3 and 6, and its adapter."""
    folder = tmp_path_factory.mktemp("finished")
    write_jsonl(folder / "pairs.jsonl", make_pairs(30))
    names = ["--model_name_or_path", BASE_MODEL, "--dataset_name", folder / "pairs.jsonl"]
    assert essa("trdpo", *names, *SMALL, "--no_report", "--output_dir", folder / "run").exit_code == 0
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(("name", "harm"), [*DAMAGE.items(), *MORE])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(run, finished, caplog, name, harm):
    harm(run / "checkpoint-6" / name)
    shutil.rmtree(run / "adapter")
    result = essa("trdpo", "--resume_from_checkpoint", run)
    assert result.exit_code == 0, result.output
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any(f"checkpoint-6 is left out: {name} is damaged: " in message for message in warned), warned
    assert adapter(run) == adapter(finished)
    assert damage(run / "checkpoint-6") is None
    harm(run / "checkpoint-3" / name)
    harm(run / "checkpoint-6" / name)
    result = essa("trdpo", "--resume_from_checkpoint", run)
    assert result.exit_code == 2 and f"of the first, checkpoint-3, {name} is damaged: " in result.stderr


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_that_lacks_a_file_is_left_out(run, caplog, name):
    (run / "checkpoint-6" / name).unlink()
    assert last_sound_checkpoint(run) == run / "checkpoint-3"
    assert f"it has no {name}" in caplog.text or name == "trainer_state.json", caplog.text
    (run / "checkpoint-3" / name).unlink()
    with pytest.raises(InputError, match=r"no checkpoint in .* can be resumed from|no checkpoint to resume"):
        last_sound_checkpoint(run)


def test_of_a_whole_model_every_part_must_be_there(make, tmp_path):
    make(whole=True, save_strategy="steps", save_steps=8).train()
    checkpoint = tmp_path / "run/checkpoint-8"
    assert damage(checkpoint) is None
    (checkpoint / "model.safetensors").unlink()
    assert (
        damage(checkpoint) == "it has no adapter_model.safetensors, model.safetensors or model.safetensors.index.json"
    )
    make_model().save_pretrained(checkpoint, max_shard_size="20KB")
    parts = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(parts) > 1 and damage(checkpoint) is None
    for part in parts:
        content = part.read_bytes()
        part.unlink()
        assert damage(checkpoint) == f"it has no {part.name}"
        part.write_bytes(content)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    assert damage(checkpoint) == "model.safetensors.index.json is damaged: it names no files"


def test_every_adapter_must_be_there(make, tmp_path, lora):
    model = get_peft_model(make_model(), lora, adapter_name="policy")
    make(model, save_strategy="steps", save_steps=8).train()
    checkpoint = tmp_path / "run/checkpoint-8"
    assert damage(checkpoint) is None
    cut(checkpoint / "policy/adapter_model.safetensors")
    assert str(damage(checkpoint)).startswith("policy/adapter_model.safetensors is damaged: ")
    (checkpoint / "policy/adapter_model.safetensors").unlink()
    assert damage(checkpoint) == "it has no policy/adapter_model.safetensors"


def test_random_states_of_several_processes_are_all_there(run):
    checkpoint = run / "checkpoint-6"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    for number in (1, 2):
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / f"rng_state_{number}.pth")
    assert damage(checkpoint) is None
    (checkpoint / "rng_state_1.pth").unlink()
    assert damage(checkpoint) == "it has no rng_state_1.pth"


@pytest.mark.parametrize("only", [True, False])
def test_a_run_may_save_only_the_model(make, tmp_path, only):
    make(save_strategy="steps", save_steps=8, save_only_model=only).train()
    checkpoint = tmp_path / "run/checkpoint-8"
    assert damage(checkpoint) is None
    assert (checkpoint / "optimizer.pt").exists() != only
    if only:
        (checkpoint / "training_args.bin").unlink()
        assert damage(checkpoint) == "it has no optimizer.pt"


def test_a_checkpoint_asked_for_by_name_is_not_replaced(make, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    make(**saving).train()
    cut(tmp_path / "run/checkpoint-8/optimizer.pt")
    with pytest.raises(InputError, match=r"optimizer.pt is damaged: .*; the checkpoint before it is '.*checkpoint-4'"):
        make(**saving).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-8"))
    (tmp_path / "run/checkpoint-4/scheduler.pt").unlink()
    with pytest.raises(InputError, match=r"cannot be resumed from: it has no scheduler.pt$"):
        make(**saving).train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-4"))
    shutil.rmtree(tmp_path / "run/checkpoint-4")
    shutil.rmtree(tmp_path / "run/checkpoint-8")
    with pytest.raises(InputError, match="no checkpoint to resume"):
        last_sound_checkpoint(tmp_path / "run")


def test_nothing_is_unpickled_from_a_checkpoint(make, tmp_path):
    """What torch writes is a pickle in an archive: one that would run something is refused, and does not."""

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    make(save_strategy="steps", save_steps=4).train()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        folder = shutil.copytree(tmp_path / "run/checkpoint-4", tmp_path / f"with-{name}" / "checkpoint-4")
        torch.save(Evil(), folder / name, pickle_module=pickle)
        with pytest.raises(InputError, match="cannot be loaded: Weights only load failed"):
            make(name="again").train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kills", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_kills_at_random_moments_lose_nothing_but_the_steps_since_a_checkpoint(make, tmp_path, seed, kills):
    """A checkpoint is written after every step, so kills fall into its writing too."""
    rng, base = random.Random(seed), make_model()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def fresh(name):
        model = make_model()
        model.load_state_dict(state)
        return make(model, name=name, max_steps=4 * kills, save_strategy="steps", save_steps=1, save_total_limit=3)

    whole = fresh("whole")
    started = time.monotonic()
    whole.train()
    step = (time.monotonic() - started) / (4 * kills)
    whole.save_model(str(tmp_path / "whole/adapter"))
    killed, run = 0, tmp_path / "killed"
    while killed < kills:
        trainer, before = fresh("killed"), len(whole_checkpoints(run))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                trainer.train(resume_from_checkpoint=True if before else None)
                status = 0
            finally:
                os._exit(status)
        time.sleep(rng.uniform(0.0, 6 * step))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        if os.WIFEXITED(status):
            break
        killed += 1
        # Whatever was cut short, there is one to go on from as soon as one was finished.
        assert not whole_checkpoints(run) or last_sound_checkpoint(run)
    last = fresh("killed")
    last.train(resume_from_checkpoint=bool(whole_checkpoints(run)))
    last.save_model(str(run / "adapter"))
    print(f"{killed} kills, the last resumed run went on to step {last.state.global_step}")
    assert adapter(run) == adapter(tmp_path / "whole")
    for name, tensor in whole.reference.weights().items():
        assert torch.equal(tensor, last.reference.weights()[name]), name
