from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
from essa.checkpoint import HISTORY_FILE, Run
from essa.cli import app
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL
from typer.testing import CliRunner

COMMANDS = typer.main.get_command(app).commands
SMALL = ["--max_new_tokens", "4", "--population_size", "16", "--prompts_per_generation", "4"]


def essa(*arguments):
    """What a command says, and its exit code; an exception that it does not turn into those is the test's."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def data(tmp_path):
    """Files of the demo's task: `(train, evaluation)`."""
    for name, split, count in (("train", "train", 60), ("test", "validation", 20)):
        task.write_jsonl(tmp_path / f"{name}.jsonl", task.rows(task.split(split)[:count]))
    return tmp_path / "train.jsonl", tmp_path / "test.jsonl"


@pytest.fixture
def align(data, warm_start, tmp_path):
    """The arguments of a small `essa align`."""
    train, evaluation = data
    names = ["--model_name_or_path", BASE_MODEL, "--adapter", warm_start, "--dataset_name", train]
    rest = ["--eval_dataset_name", evaluation, "--reward", "exact_match", "--output_dir", tmp_path / "run"]
    return ["align", *names, *rest, *SMALL, "--generations", "3"]


def without(arguments, option):
    place = arguments.index(option)
    return arguments[:place] + arguments[place + 2 :]


def weights(folder):
    return Path(folder, "adapter", "adapter_model.safetensors").read_bytes()


def process(*arguments, **options):
    command = [sys.executable, "-m", "essa.cli", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run_apart(*arguments):
    """A whole run in a process of its own."""
    running = process(*arguments)
    _, told = running.communicate()
    assert running.returncode == 0, told


def test_weights_are_searched_without_an_adapter_and_come_out_as_a_model(align, data, tmp_path):
    chosen = ["--parametrization", "lowrank", "--noise", "rademacher", "--optimizer", "momentum"]
    result = essa(*without(align, "--adapter"), *chosen)
    assert result.exit_code == 0, result.output
    model = tmp_path / "run" / "model"
    assert f"model:   {model}" in result.stdout
    assert "the weights of a model, with low-rank noise" in (tmp_path / "run" / "report.html").read_text()
    rest = ["--dataset_name", data[1], "--reward", "exact_match", "--max_new_tokens", "4"]
    measured = essa("eval", "--model_name_or_path", model, *rest)
    assert measured.exit_code == 0, measured.output
    record = [record for record in Run.read(tmp_path / "run").records if "evaluation" in record][-1]
    assert json.loads(measured.stdout.splitlines()[-1])["reward"] == record["evaluation"]["reward"]
    refused = essa(
        *without(align, "--output_dir"),
        "--output_dir",
        tmp_path / "x",
        "--parametrization",
        "full",
        "--strategy",
        "cma",
    )
    assert refused.exit_code == 2 and "parametrization 'full' has" in refused.stderr


def test_align_and_eval(align, data, tmp_path, pictures):
    result = essa(*align)
    assert result.exit_code == 0, result.output
    for words in ("generation 3/3", "evaluation: ", "48 samples", "adapter: ", "report.html"):
        assert words in result.output
    reported = Run.read(tmp_path / "run").records[-1]["evaluation"]["reward"]
    result = essa(
        "eval", "--model_name_or_path", BASE_MODEL, "--adapter", tmp_path / "run" / "adapter",
        "--dataset_name", data[1], "--reward", "exact_match", "--max_new_tokens", "4",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    numbers = json.loads(result.stdout)
    assert numbers["reward"] == reported and numbers["samples"] == 20
    assert "exact_match" in result.stderr and f"{reported:,.4g}" in result.stderr


def test_eval_renders_the_prompts_of_the_run(chat_tokenizer, data, tmp_path):
    model = shutil.copytree(BASE_MODEL, tmp_path / "model")
    chat_tokenizer.chat_template = (
        "{% if mark is not defined %}{{ raise_exception('no mark') }}{% endif %}" + chat_tokenizer.chat_template
    )
    chat_tokenizer.save_pretrained(model)
    row = {"prompt": [{"role": "user", "content": "26+01"}], "answer": "027"}
    task.write_jsonl(tmp_path / "chat.jsonl", [row])
    command = ["eval", "--model_name_or_path", model, "--dataset_name", tmp_path / "chat.jsonl"]
    command += ["--reward", "exact_match", "--max_new_tokens", "4"]
    for given, code, told in (
        ([], 2, "no mark"),
        (["--chat_template_kwargs", "mark"], 2, "chat_template_kwargs must be a JSON object, got 'mark'"),
        (["--chat_template_kwargs", '{"mark": 1}'], 0, "exact_match"),
    ):
        result = essa(*command, *given)
        assert result.exit_code == code and told in result.stderr, result.output


def test_a_yaml_file_sets_options_and_the_command_line_wins(align, tmp_path):
    import yaml

    names = [str(word).lstrip("-") for word in align[1::2]]
    settings = dict(zip(names, map(str, align[2::2]), strict=True))
    settings |= {"generations": 9, "sigma": 0.25, "reward": ["exact_match"], "population-size": 8, "progress": False}
    del settings["population_size"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = essa("align", "--config", tmp_path / "run.yaml", "--generations", "2", "--offset-mode", "relative")
    assert result.exit_code == 0, result.output
    run = Run.read(tmp_path / "run")
    recorded = run.identity["settings"]
    assert (recorded["sigma"], recorded["population_size"], recorded["offset_mode"]) == (0.25, 8, "relative")
    assert run.about["settings"]["generations"] == 2


@pytest.mark.parametrize("config_first", [True, False])
def test_the_order_of_options_does_not_matter(align, tmp_path, config_first):
    assert essa(*align).exit_code == 0
    (tmp_path / "run.yaml").write_text("generations: 4\nlogging_steps: 2\n")
    options = [("--config", tmp_path / "run.yaml"), ("--resume_from_checkpoint", tmp_path / "run")]
    result = essa("align", *(word for option in options[:: 1 if config_first else -1] for word in option))
    assert result.exit_code == 0, result.output
    assert "resumed after generation 3 of 4" in result.stderr
    settings = Run.read(tmp_path / "run").about["settings"]
    assert (settings["generations"], settings["logging_steps"]) == (4, 2)


def test_a_run_resumed_from_a_yaml_file(align, tmp_path):
    assert essa(*align).exit_code == 0
    (tmp_path / "run.yaml").write_text(f"resume_from_checkpoint: {tmp_path / 'run'}\ngenerations: 4\n")
    result = essa("align", "--config", tmp_path / "run.yaml")
    assert result.exit_code == 0 and "resumed after generation 3 of 4" in result.stderr, result.output


def test_a_yaml_file_may_hold_what_the_command_line_takes(align, tmp_path):
    """One value of an option that may repeat, an alias, arguments of the chat template."""
    settings = {"reward": "exact_match", "workers": 0, "reward_weights": 0.5, "eval_dataset_name": None}
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "chat_template_kwargs": {"mark": "="}}))
    options = without(without(align, "--reward"), "--eval_dataset_name")
    refused = essa(*options, "--config", tmp_path / "run.yaml")
    assert refused.exit_code == 2 and "chat_template_kwargs needs prompts that are messages" in refused.stderr
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    result = essa(*options, "--config", tmp_path / "run.yaml", "--generations", 1)
    assert result.exit_code == 0, result.output
    run = Run.read(tmp_path / "run")
    assert run.identity["rewards"] == ["exact_match"] and run.identity["settings"]["reward_weights"] == [0.5]


def test_a_yaml_file_may_list_what_the_command_line_takes_with_commas(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "3+4=", "completion": "7"}) + "\n")
    (tmp_path / "sft.yaml").write_text("lora_target_modules: [q_proj, v_proj]\nlora_r: 2\nmax_steps: 1\n")
    command = ["sft", "--model_name_or_path", BASE_MODEL, "--dataset_name", rows]
    result = essa(*command, "--output_dir", tmp_path / "adapter", "--config", tmp_path / "sft.yaml")
    assert result.exit_code == 0, result.output
    adapted = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(adapted) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("workers: 1\nnum_workers: 2", "option 'num_workers' is given twice"),
        ("sigma: [1, 2]", "option 'sigma' takes one value, got [1, 2]"),
        ("config: x", "unknown option 'config'"),
        (
            "chat_template_kwargs: {date_string: 2026-01-01}",
            "takes what JSON can say, got {'date_string': datetime.date",
        ),
        ("sigmaa: 0.2", "unknown option 'sigmaa' - did you mean 'sigma'?"),
        ("- 1", "must hold `option: value` lines"),
        ("a: [", "cannot read"),
        ("sigma: wide", "sigma"),
    ],
)
def test_a_wrong_yaml_file_is_named(align, tmp_path, content, message):
    (tmp_path / "run.yaml").write_text(content)
    result = essa(*align, "--config", tmp_path / "run.yaml")
    assert result.exit_code == 2
    assert message in result.stderr
    assert essa(*align, "--config", tmp_path / "missing.yaml").exit_code == 2


def test_resume_takes_its_options_from_the_run(align, tmp_path):
    assert essa(*align).exit_code == 0
    result = essa("align", "--resume_from_checkpoint", tmp_path / "run", "--generations", "5")
    assert result.exit_code == 0, result.output
    assert "resumed after generation 3 of 5" in result.stderr
    # The longer run's own length is what the next resume starts from.
    assert essa("align", "--resume_from_checkpoint", tmp_path / "run").exit_code == 0

    longer = without(without(align, "--output_dir"), "--generations")
    assert essa(*longer, "--output_dir", tmp_path / "whole", "--generations", 5).exit_code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")

    result = essa("align", "--resume_from_checkpoint", tmp_path / "run", "--sigma", "0.9")
    assert result.exit_code == 2 and re.search(r"settings sigma was .*, now 0.9", result.stderr)
    result = essa("align", "--resume_from_checkpoint", tmp_path / "nothing")
    assert result.exit_code == 2 and "no run to resume" in result.stderr


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_minus_nine_and_resume_end_in_the_same_bits(align, tmp_path, workers):
    if workers and importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray")
    long = [*without(without(align, "--generations"), "--output_dir"), "--generations", "25", "--strategy", "cma"]
    long += ["--num_workers", workers, "--row_budget", "32"]
    run_apart(*long, "--output_dir", tmp_path / "whole")

    folder = tmp_path / "killed"
    running = process(*long, "--output_dir", folder)
    while not (folder / HISTORY_FILE).exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.005)
    time.sleep(random.uniform(0.0, 0.5))
    os.kill(running.pid, signal.SIGKILL)
    running.communicate()
    done = sum("rewards" in record for record in Run.read(folder).records)
    assert done < 25

    run_apart("align", "--resume_from_checkpoint", folder)
    assert weights(folder) == weights(tmp_path / "whole")
    whole, resumed = (
        [(record["prompts"], record["candidates"], record["rewards"]) for record in run.records if "rewards" in record]
        for run in (Run.read(tmp_path / "whole"), Run.read(folder))
    )
    assert resumed == whole


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupting_tells_how_to_resume(align, tmp_path, sent, code, workers):
    if workers and importlib.util.find_spec("ray") is None:
        pytest.skip("needs Ray")
    # Tests that a shell runs in the background ignore SIGINT, and so would what they start.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    endless = [*without(align, "--generations"), "--generations", "100000", "--num_workers", workers]
    running = process(*endless, "--row_budget", "8", preexec_fn=heard)
    history = tmp_path / "run" / HISTORY_FILE
    while not (history.exists() and history.stat().st_size > 3000):
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.01)
    running.send_signal(sent)
    _, told = running.communicate(timeout=60)
    assert running.returncode == code
    assert f"--resume_from_checkpoint {tmp_path / 'run'}" in told
    assert "Traceback" not in told


def test_a_folder_with_another_run_is_refused(align, tmp_path):
    assert essa(*align).exit_code == 0
    before = (tmp_path / "run" / HISTORY_FILE).read_bytes()
    result = essa(*align, "--seed", "5")
    assert result.exit_code == 2 and "already holds a run" in result.stderr
    assert (tmp_path / "run" / HISTORY_FILE).read_bytes() == before


@pytest.mark.parametrize("name", ["adapter", "model", "trdpo.json"])
def test_results_of_another_kind_of_run_are_not_overwritten(align, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    result = essa(*align)
    assert result.exit_code == 2 and f"holds {name!r} already, which is not overwritten" in result.stderr
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_a_folder_that_cannot_be_made_is_named(align, tmp_path):
    (tmp_path / "file").write_text("")
    result = essa(*without(align, "--output_dir"), "--output_dir", tmp_path / "file" / "run")
    assert result.exit_code == 2 and "cannot be made: Not a directory" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--population_size", "1", "population_size must be a whole number of at least 2, got 1"),
        ("--population_size", "many", "--population_size"),
        ("--sigma", "0", "sigma must be a finite number above 0, got 0.0"),
        ("--alpha", "2", "alpha must be a finite number above 0 and at most 1, got 2.0"),
        ("--reward", "exactmatch", "did you mean 'exact_match'"),
        ("--dataset_name", "missing.jsonl", "dataset_name 'missing.jsonl': no such file"),
        ("--model_name_or_path", "./missing", "model_name_or_path './missing' cannot be loaded"),
        ("--adapter", "./missing", "adapter './missing' is not a folder"),
        ("--adapter", None, "carries no LoRA adapter"),
        ("--eval_split", "0.5", "eval_dataset_name and eval_split cannot both be given"),
        ("--max_new_tokens", "28", "the prompt has 7 tokens, but only 4 fit into the model's context"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_two(align, tmp_path, option, value, message):
    arguments = without(align, option) if option in align else align
    result = essa(*arguments, *([] if value is None else [option, value]))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_users_own_reward_is_imported_from_the_working_folder(align, tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def first_digit(completions, answer, **kwargs):\n"
        "    return [float(c[:1] == a[:1]) for c, a in zip(completions, answer)]\n"
        "def broken(completions, **kwargs):\n    raise RuntimeError('oh')\n"
    )
    monkeypatch.chdir(tmp_path)
    align = without(align, "--reward")
    result = essa(*align, "--reward", "my_rewards:first_digit", "--reward", "exact_match", "--reward_weights", "0.5",
                  "--reward_weights", "1")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Run.read("run").identity["rewards"] == ["my_rewards:first_digit", "exact_match"]
    result = essa(*without(align, "--output_dir"), "--output_dir", "broken", "--reward", "my_rewards:broken")
    assert result.exit_code == 2
    for words in (
        "'my_rewards:broken' raised RuntimeError: oh",
        "member 0, prompt 0",
        "--resume_from_checkpoint broken",
    ):
        assert words in result.stderr


def test_sft_makes_what_align_needs(data, tmp_path):
    pairs = task.demonstrations(task.split("train"), 50, task.DEMONSTRATION_MIXTURE, random.Random(0))
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    task.write_jsonl(tmp_path / "sft.jsonl", rows)
    arguments = ["sft", "--model_name_or_path", BASE_MODEL, "--output_dir", tmp_path / "warm", "--max_steps", "3"]
    result = essa(
        *arguments, "--dataset_name", tmp_path / "sft.jsonl", "--lora_r", "2", "--lora_target_modules", "q_proj"
    )
    assert result.exit_code == 0, result.output
    assert "step 3/3: loss" in result.stderr
    names = ["--model_name_or_path", BASE_MODEL, "--adapter", tmp_path / "warm", "--dataset_name", data[0]]
    result = essa("align", *names, "--reward", "exact_match", "--output_dir", tmp_path / "run", *SMALL,
                  "--generations", "1", "--eval_split", "0.2")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert Run.read(tmp_path / "run").identity["dataset"]["rows"] == 48
    result = essa(*arguments, "--dataset_name", data[0])
    assert result.exit_code == 2 and "not empty" in result.stderr


def test_info():
    result = essa("info")
    assert result.exit_code == 0
    assert "svd_lora" in result.stdout and '"noise_version": 1' in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command):
    result = essa(command, "--help")
    assert result.exit_code == 0
    shown = "".join(result.output.split())
    for option in COMMANDS[command].params:
        for name in (*option.opts, *option.secondary_opts):
            assert re.search(rf"{name}\b", result.output), name
        assert len(option.help or "") > 5, option.name
        assert "".join(option.help.split()) in shown, option.name


def test_there_is_help_for_every_command():
    assert {"align", "trdpo", "sft", "eval", "demo", "plan", "info"} == COMMANDS.keys()
    result = essa("--help")
    for name, command in COMMANDS.items():
        assert re.search(rf"^ *{name} +\w", result.output, re.MULTILINE) and command.help


def test_help_imports_nothing_heavy():
    assert importlib.util.find_spec("torch")
    code = (
        "import sys, essa, essa.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(essa.cli.app, ['trdpo', '--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy', 'datasets', 'matplotlib') if m in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
