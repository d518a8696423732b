"""The hub is not waited for where it cannot be reached, not asked where it must not be, and nothing from it is run."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import socket
import time

import datasets
import pytest
from essa import hub
from essa.cli import app
from essa.config import InputError
from essa.data import read_rows
from essa.demo.warm_start import BASE_MODEL
from essa.models import ModelSource, load_base, load_tokenizer
from huggingface_hub import constants
from typer.testing import CliRunner


@pytest.fixture
def hub_at(monkeypatch):
    """Say where the hub is and whether the environment goes by a proxy; what is found out is forgotten afterwards."""

    def settle(endpoint, proxies=None, offline=False):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "0")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(hub, "getproxies", lambda: proxies or {})

    return settle


@pytest.fixture
def connections(monkeypatch):
    """The addresses that something tries to connect to; none can be."""
    tried = []

    def refuse(address, *_, **__):
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried


def test_a_hub_that_cannot_be_reached_is_asked_once(hub_at, connections):
    hub_at("https://hub.invalid:8443")
    hub.reach_hub("someone/model")
    assert connections == [("hub.invalid", 8443)] and constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"
    hub.reach_hub("someone/other")
    assert len(connections) == 1
    assert "https://hub.invalid:8443 cannot be reached or HF_HUB_OFFLINE is set" in hub.offline_note()


def test_a_hub_that_answers_is_left_to_the_libraries(hub_at):
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub_at(f"http://127.0.0.1:{server.getsockname()[1]}")
        hub.reach_hub("someone/model")
    assert not constants.HF_HUB_OFFLINE and hub.offline_note() == ""


def test_paths_a_proxy_and_offline_use_are_not_tried(hub_at, connections, tmp_path):
    hub_at("https://hub.invalid")
    for name in (str(tmp_path), "./missing", "/missing", str(BASE_MODEL)):
        hub.reach_hub(name)
    hub_at("https://hub.invalid", proxies={"https": "http://proxy.invalid"})
    hub.reach_hub("someone/model")
    hub_at("https://hub.invalid", offline=True)
    hub.reach_hub("someone/model")
    assert connections == []


@pytest.mark.parametrize("offline", [False, True])
def test_a_name_that_is_not_here_fails_fast_and_says_why(hub_at, connections, monkeypatch, tmp_path, offline):
    hub_at("https://hub.invalid", offline=offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    why = "https://hub.invalid cannot be reached or HF_HUB_OFFLINE is set: only local paths and cached names work"
    for ask in (lambda: load_base("someone/none-such-model"), lambda: read_rows("someone/none-such-rows")):
        with pytest.raises(InputError, match=why):
            ask()
    assert time.monotonic() - started < 20
    assert len(connections) == (0 if offline else 1)


def test_code_of_a_model_is_not_run_unless_asked_for(tmp_path):
    for function in (load_base, load_tokenizer, ModelSource):
        assert inspect.signature(function).parameters["trust_remote_code"].default is False
    folder = shutil.copytree(BASE_MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {
        "model_type": "its_own",
        "auto_map": {"AutoConfig": "its_own.Config", "AutoModelForCausalLM": "its_own.Model"},
    }
    (folder / "config.json").write_text(json.dumps({**config, **own}))
    (folder / "its_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(InputError, match=r"cannot be loaded: (.|\n)*trust_remote_code"):
        load_base(str(folder))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "?1+1=", "answer": "2", "chosen": "2", "rejected": "3", "completion": "2"}\n')
    names = ["--model_name_or_path", str(folder), "--dataset_name", str(rows)]
    for command in (
        ["align", *names, "--reward", "exact_match", "--output_dir", str(tmp_path / "a")],
        ["trdpo", *names, "--output_dir", str(tmp_path / "t"), "--device", "cpu"],
        ["sft", *names, "--output_dir", str(tmp_path / "s")],
        ["eval", *names, "--reward", "exact_match"],
        ["plan", "--model_name_or_path", str(folder)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and "trust_remote_code" in result.stderr, (command[0], result.output)
    assert not (tmp_path / "ran").exists()
