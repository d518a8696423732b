"""Resuming runs no code that only the folder of the run names."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from essa.checkpoint import COMMAND_FILE, RUN_FILE
from essa.cli import app
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL
from essa.recorded import brings_in_code, resume_command
from typer.testing import CliRunner

SMALL = ["--max_new_tokens", "4", "--population_size", "4", "--prompts_per_generation", "2", "--no_progress"]


def essa(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module in the working folder, and a model folder with code of its own, which leave a file when they are run."""
    ran = tmp_path / "ran"
    monkeypatch.chdir(tmp_path)
    code = f"open({str(ran)!r}, 'w').close()\n"
    (tmp_path / "evil.py").write_text(code + "def reward(completions, **_): return [1.0] * len(completions)\n")
    model = shutil.copytree(BASE_MODEL, tmp_path / "evil-model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil_config.Config"}}))
    (model / "evil_config.py").write_text(
        code + "from transformers import LlamaConfig\nclass Config(LlamaConfig): pass\n"
    )
    yield ran
    sys.modules.pop("evil", None)


@pytest.fixture
def run(warm_start, tmp_path):
    """Start `essa align` with these options more, in the folder `run`."""

    def start(*options):
        task.write_jsonl(tmp_path / "rows.jsonl", task.rows(task.split("train")[:20]))
        names = ["--model_name_or_path", BASE_MODEL, "--adapter", warm_start, "--dataset_name", tmp_path / "rows.jsonl"]
        rest = ["--output_dir", tmp_path / "run", *SMALL, "--generations", "1"]
        result = essa("align", *names, *rest, *options)
        assert result.exit_code == 0, result.output
        return tmp_path / "run"

    return start


def edit(path, **options):
    content = json.loads(path.read_text())
    command = content["about"]["command"] if path.name == RUN_FILE else content
    command.update(options)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("edited", "told"),
    [
        ({"reward": ["evil:reward"]}, "add: --reward evil:reward\n"),
        ({"reward": ["exact_match", "evil:reward"]}, "add: --reward exact_match --reward evil:reward\n"),
        ({"strategy": "evil:reward"}, "add: --strategy evil:reward\n"),
        ({"parametrization": "evil:reward"}, "add: --parametrization evil:reward\n"),
        ({"parametrization": ["evil:reward"]}, "add: --parametrization"),
        ({"ray_address": "1.2.3.4:6379", "num_workers": 1}, "add: --ray_address 1.2.3.4:6379\n"),
        ({"trust_remote_code": True, "model_name_or_path": "evil-model"}, "add: --trust_remote_code\n"),
        ({"trust_remote_code": "yes", "model_name_or_path": "evil-model"}, "add: --trust_remote_code\n"),
    ],
    ids=str,
)
def test_what_only_the_record_of_align_names_is_not_run(run, evil, edited, told):
    folder = run("--reward", "exact_match")
    edit(folder / RUN_FILE, **edited)
    result = essa("align", "--resume_from_checkpoint", folder, "--generations", 2)
    assert result.exit_code == 2 and told in result.stderr, result.output
    assert "only its record names" in result.stderr and not evil.exists() and "evil" not in sys.modules


def test_a_record_names_no_file_of_options(run, evil, tmp_path):
    folder = run("--reward", "exact_match")
    (tmp_path / "evil.yaml").write_text("reward: evil:reward\n")
    edit(folder / RUN_FILE, config=str(tmp_path / "evil.yaml"))
    result = essa("align", "--resume_from_checkpoint", folder, "--generations", 2)
    assert result.exit_code == 0 and not evil.exists(), result.output


def test_another_model_without_trust_runs_none_of_its_code(run, evil):
    folder = run("--reward", "exact_match")
    edit(folder / RUN_FILE, model_name_or_path="evil-model")
    resume = ["align", "--resume_from_checkpoint", folder, "--generations", 2]
    result = essa(*resume)
    assert result.exit_code == 2 and "cannot be resumed with other settings" in result.stderr
    assert not evil.exists()
    # With trust it would have been run.
    essa(*resume, "--trust_remote_code")
    assert evil.exists()


def test_what_is_named_again_is_run(run, evil, tmp_path):
    folder = run("--reward", "evil:reward")
    resume = ["align", "--resume_from_checkpoint", folder]
    refused = essa(*resume, "--generations", 2)
    assert refused.exit_code == 2
    again = refused.stderr.strip().rpartition("add: ")[2].split()
    assert again == ["--reward", "evil:reward"]
    assert essa(*resume, "--generations", 2, *again).exit_code == 0
    (tmp_path / "own.yaml").write_text("reward: [evil:reward]\ngenerations: 3\n")
    for options in (["--config", tmp_path / "own.yaml"], ["--config", tmp_path / "own.yaml", *again]):
        assert essa(*resume, *options).exit_code == 0
        assert essa("align", *options, "--resume_from_checkpoint", folder).exit_code == 0


def test_what_only_the_record_of_trdpo_names_is_not_run(evil, tmp_path):
    command = {"model_name_or_path": "evil-model", "dataset_name": "rows.jsonl"}
    for edited, told in (
        ({"trust_remote_code": True}, "add: --trust_remote_code\n"),
        ({"attn_implementation": "someone/kernel"}, "add: --attn_implementation someone/kernel\n"),
    ):
        (tmp_path / COMMAND_FILE).write_text(json.dumps({**command, **edited}))
        result = essa("trdpo", "--resume_from_checkpoint", tmp_path)
        assert result.exit_code == 2 and told in result.stderr, result.output
    assert not evil.exists()


@pytest.mark.parametrize(("content", "told"), [("[]", "an object of options, got list"), ("{", "is damaged")])
def test_a_damaged_command_is_named(run, tmp_path, content, told):
    (tmp_path / COMMAND_FILE).write_text(content)
    result = essa("trdpo", "--resume_from_checkpoint", tmp_path)
    assert result.exit_code == 2 and told in result.stderr and COMMAND_FILE in result.stderr
    folder = run("--reward", "exact_match")
    about = json.loads((folder / RUN_FILE).read_text())
    about["about"]["command"] = [1]
    (folder / RUN_FILE).write_text(json.dumps(about))
    result = essa("align", "--resume_from_checkpoint", folder)
    assert result.exit_code == 2 and "its command is [1]" in result.stderr


def test_a_stopped_run_says_what_to_repeat(run, evil, monkeypatch):
    from essa.trainer import ESSATrainer

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ESSATrainer, "_generation", stop)
        with pytest.raises(AssertionError, match=r"run --reward evil:reward --trust_remote_code`"):
            run("--reward", "evil:reward", "--trust_remote_code")


def test_which_options_bring_in_code():
    assert brings_in_code("reward", ["exact_match", "mine:score"]) and brings_in_code("trust_remote_code", True)
    plain = {"reward": ["math"], "strategy": "es", "parametrization": "svd", "ray_address": "auto"}
    plain |= {"trust_remote_code": False, "attn_implementation": "sdpa", "dataset_name": "a:b", "seed": 1}
    assert not [name for name, value in plain.items() if brings_in_code(name, value)]
    assert resume_command("trdpo", "a b", plain) == "essa trdpo --resume_from_checkpoint 'a b'"
    asked = {"reward": ["math", "my:f g"], "trust_remote_code": True}
    assert resume_command("align", "run", asked).endswith("run --reward math --reward 'my:f g' --trust_remote_code")
