"""Runs on Ray workers end in the bits of a run in one process, whatever becomes of the workers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from essa.checkpoint import Run
from essa.chunks import places_of
from essa.config import ESSAConfig, InputError
from essa.demo.warm_start import BASE_MODEL
from essa.messages import pack, unpack
from essa.models import ModelSource, weight_digests
from essa.replica import Recipe, Replica, WorkerError
from essa.rewards import RewardError
from essa.workers import LOOPBACK, connect
from transformers import TrainerCallback

from .ray_workers import replicas

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray of this machine's own, as `essa align --num_workers 2` starts it."""
    disconnect = connect(ESSAConfig("unused", num_workers=2))
    yield
    disconnect()


@pytest.fixture
def own_ray():
    """Every run of the test starts a Ray as large as it needs."""
    import ray

    ray.shutdown()


def adapter(trainer) -> bytes:
    return Path(trainer.args.output_dir, "adapter", "adapter_model.safetensors").read_bytes()


class KillWorkers(TrainerCallback):
    """kill -9 of `count` workers, a moment after each of the steps began."""

    def __init__(self, count: int, steps: set[int]) -> None:
        self.count, self.steps, self.killed = count, steps, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            threading.Timer(0.03, self.kill).start()

    def kill(self):
        for pid in replicas()[: self.count]:
            os.kill(pid, signal.SIGKILL)
            self.killed += 1


SMALL = {"row_budget": 5, "eval_steps": 2, "strategy": "zo-grpo"}


def test_workers_that_are_killed_do_not_show_in_the_result(cluster, make_trainer):
    alone = make_trainer("alone", **SMALL)
    alone.train()
    kill = KillWorkers(1, {1, 2})
    shared = make_trainer(**SMALL, num_workers=2, callbacks=[kill])
    shared.train()
    assert kill.killed == 2 == shared._workers.lost
    assert adapter(shared) == adapter(alone)
    records, expected = Run.read(shared.args.output_dir).records, Run.read(alone.args.output_dir).records
    for one, other in zip(records, expected, strict=True):
        if "rewards" in one:
            assert all(one[name] == other[name] for name in ("prompts", "candidates", "rewards", "scores", "tokens"))
            assert 0 < one["bytes_per_worker"] < 65536 and one["workers"] == 2
        else:
            assert one["evaluation"]["reward"] == other["evaluation"]["reward"]


@pytest.mark.slow
def test_a_reward_error_comes_from_its_worker_to_the_user(cluster, make_trainer):
    def fragile(completions, **kwargs):
        return [float("nan") for _ in completions]

    def quits(completions, **kwargs):
        sys.exit("bye")

    for reward, told in ((fragile, "fragile' returned nan"), (quits, "quits' raised SystemExit: bye")):
        trainer = make_trainer(reward.__name__, reward_funcs=reward, num_workers=1, eval_dataset=None)
        with pytest.raises(RewardError, match=rf"{told}.*member 0, prompt.*\n?.*Stopped after generation 0"):
            trainer.train()
        time.sleep(1.0)
        assert not replicas()


def test_ray_listens_on_the_loopback_address_alone(cluster):
    import ray

    assert ray.util.get_node_ip_address() == LOOPBACK
    mine = {entry.split("[")[1].rstrip("]") for entry in sockets()}
    listening = [
        line.split() for path in ("tcp", "tcp6") for line in Path("/proc/net", path).read_text().splitlines()[1:]
    ]
    addresses = {line[1].split(":")[0] for line in listening if line[3] == "0A" and line[9] in mine}
    assert addresses
    assert addresses <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def sockets() -> list[str]:
    """Sockets of Ray's processes, and of this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if b"ray" in command.split(b"\0")[0] or b"/ray/" in command or folder.name == str(os.getpid()):
                found += [os.readlink(handle) for handle in (folder / "fd").iterdir()]
        except OSError:
            continue
    return [name for name in found if name.startswith("socket:")]


def recipe(trainer, warm_start, base=BASE_MODEL, weights=None) -> Recipe:
    source = ModelSource(str(base), warm_start)
    prompts = trainer.train_prompts, trainer.eval_prompts
    return Recipe(source, trainer.args, None, *prompts, "exact_match", weights or weight_digests(trainer.model))


def test_a_replica_catches_up_and_answers_for_what_another_computed(make_trainer, warm_start):
    trainer = make_trainer(**SMALL, generations=3)
    weights = weight_digests(trainer.model)
    trainer.train()
    history = [record for record in Run.read(trainer.args.output_dir).records if "rewards" in record]
    replica = Replica(recipe(trainer, warm_start, weights=weights))
    replica.start()
    last, rows = history[2], pack({"rows": [5, 10]})
    told = [pack({"told": record}) for record in history[:2]]
    about = {"generation": 2, "prompts": last["prompts"], "epoch": 0.2, "candidates": last["candidates"]}
    asked = pack({"asked": about})
    replica.hear(told[:1])
    reply = unpack(replica.evaluate(rows, [told[1], asked]))
    assert reply["rewards"].tolist() == [row[0] for row in last["rewards"][5:10]]
    late = Replica(recipe(trainer, warm_start, weights=weights))
    late.start()
    first, second = (np.array(scores) for scores in last["scores"])
    question = [pack({"rewards": np.array(last["rewards"])}), pack({"scores": first})]
    scores = unpack(late.score(rows, [*told, asked, *question]))["scores"]
    members, _ = late._search.asked(2, np.array(last["rewards"]), [first])
    assert len(scores) and np.array_equal(scores, second[places_of(late._search, range(5, 10), 4, members)])
    with pytest.raises(WorkerError, match="a worker's candidates are not the driver's"):
        replica.evaluate(rows, [pack({"asked": {**about, "candidates": "0" * 16}})])


def test_a_worker_with_other_weights_is_refused(make_trainer, warm_start, retrained, tmp_path):
    trainer = make_trainer()
    other = shutil.copytree(warm_start, tmp_path / "other")
    retrained(other / "adapter_model.safetensors")
    base = shutil.copytree(BASE_MODEL, tmp_path / "base")
    Replica(recipe(trainer, warm_start, base)).start()
    retrained(base / "model.safetensors")
    for adapter, named in ((warm_start, base), (str(other), other)):
        with pytest.raises(InputError, match=f"{named}' has other weights for a worker than for the driver"):
            Replica(recipe(trainer, adapter, base if adapter is warm_start else BASE_MODEL)).start()
    noisy = make_trainer("noisy", parametrization="lowrank", adapter=None)
    with pytest.raises(InputError, match=f"{base}' has other weights for a worker than for the driver"):
        Replica(recipe(noisy, None, base)).start()


def test_workers_without_work_are_named(make_trainer, caplog):
    make_trainer(strategy="cma", num_workers=4, row_budget=16)
    assert not caplog.records
    make_trainer("other", strategy="cma", num_workers=4, row_budget=32)
    assert "a generation is 2 chunks of row_budget 32, so 2 of 4 workers have nothing to do" in caplog.text


def test_bad_worker_settings_are_named(make_trainer, warm_start):
    for settings, message in (
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0"),
        ({"ray_address": "auto"}, "ray_address needs num_workers of at least 1"),
        ({"gpus_per_worker": 2}, "gpus_per_worker needs num_workers of at least 1"),
        (
            {"num_workers": 1, "device": "balanced"},
            "device 'balanced' with num_workers needs gpus_per_worker of at least 2",
        ),
        ({"num_workers": 1, "gpus_per_worker": -1}, "gpus_per_worker must be a finite number of at least 0"),
        ({"num_workers": 1, "gpus_per_worker": 2.5}, "gpus_per_worker above 1 must be a whole number, got 2.5"),
        (
            {"num_workers": 1, "gpus_per_worker": 2, "device": "cuda"},
            "gpus_per_worker above 1 spreads the model: device must be auto or balanced, got 'cuda'",
        ),
        ({"num_workers": 1, "model": make_trainer("other").model, "adapter": None}, "a model given by name"),
    ):
        with pytest.raises(InputError, match=message):
            make_trainer(**settings)


def test_workers_without_room_are_named(cluster, make_trainer):
    trainer = make_trainer(num_workers=2, gpus_per_worker=0.5)
    message = (
        r"a worker takes 1 CPUs \(threads_per_worker\) and 0.5 GPUs \(gpus_per_worker\), but no node of Ray's has that"
    )
    with pytest.raises(InputError, match=f"{message}; the most of a node are 2 CPUs, 0 GPUs"):
        trainer.train()
    assert not Path(trainer.args.output_dir).exists(), "the corrected command is a new run"


def test_an_address_where_nobody_listens_is_named_at_once(own_ray, make_trainer):
    for address, message in (
        ("127.0.0.1:1", "ray_address '127.0.0.1:1': no Ray cluster there: .*Connection refused"),
        ("ray://127.0.0.1:1", "ray_address 'ray://127.0.0.1:1': no Ray cluster there"),
        ("somewhere", "ray_address must be auto or host:port, got 'somewhere'"),
    ):
        trainer = make_trainer(num_workers=1, ray_address=address)
        started = time.monotonic()
        with pytest.raises(InputError, match=message):
            trainer.train()
        assert time.monotonic() - started < 10
        assert not Path(trainer.args.output_dir).exists()


@pytest.mark.slow
def test_gpus_are_shared_as_asked(own_ray, make_trainer, caplog):
    """A Ray that is told of a GPU, which only it believes in: half of it for each worker, and no room for a third."""
    import ray

    alone = make_trainer("alone", **SMALL)
    alone.train()
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, _node_ip_address=LOOPBACK, log_to_driver=False)
    try:
        shared = make_trainer(**SMALL, num_workers=3, gpus_per_worker=0.5)
        shared.train()
    finally:
        ray.shutdown()
    assert "there is room for 2 of num_workers 3, the others wait for more" in caplog.text
    assert adapter(shared) == adapter(alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cma", "es-per-completion", "zo-grpo"])
def test_the_number_of_workers_does_not_show_in_the_result(own_ray, make_trainer, strategy):
    results = set()
    for workers in (0, 1, 2, 5):
        trainer = make_trainer(f"run{workers}", **{**SMALL, "strategy": strategy}, num_workers=workers)
        trainer.train()
        results.add(adapter(trainer))
    assert len(results) == 1


@pytest.mark.slow
def test_all_workers_may_die_at_once(own_ray, make_trainer):
    alone = make_trainer("alone", **SMALL)
    alone.train()
    kill = KillWorkers(3, {1, 3})
    shared = make_trainer(**SMALL, num_workers=3, callbacks=[kill])
    shared.train()
    assert kill.killed == 6 and adapter(shared) == adapter(alone)


@pytest.mark.slow
def test_rows_that_kill_every_worker_end_the_run(cluster, make_trainer):
    def deadly(completions, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    trainer = make_trainer(reward_funcs=deadly, num_workers=1, eval_dataset=None, **SMALL)
    with pytest.raises(WorkerError, match="5 workers died of rows 0 to 4"):
        trainer.train()


@pytest.mark.slow
def test_a_stopped_worker_is_overtaken(cluster, make_trainer):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(replicas()[0], signal.SIGSTOP)

    alone = make_trainer("alone", **SMALL)
    alone.train()
    shared = make_trainer(**SMALL, num_workers=2, callbacks=[Stop()])
    shared.train()
    assert adapter(shared) == adapter(alone)


@pytest.mark.slow
def test_a_node_that_joins_mid_run_takes_its_share(own_ray, make_trainer, tmp_path):
    """Of two workers one has to wait for the machine that it runs on."""
    import ray
    from ray.cluster_utils import Cluster

    def exact_match(completions, answer, **kwargs):
        time.sleep(0.2)
        (tmp_path / f"worker-{os.getpid()}").touch()
        return [float(text == right) for text, right in zip(completions, answer, strict=True)]

    class Join(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                machines.add_node(num_cpus=1)

        def on_step_end(self, args, state, control, **kwargs):
            workers.append(len(list(tmp_path.glob("worker-*"))))

    settings = {**SMALL, "strategy": "cma", "eval_dataset": None, "generations": 30, "reward_funcs": exact_match}
    alone = make_trainer("alone", **settings)
    alone.train()
    (tmp_path / f"worker-{os.getpid()}").unlink()
    machines, workers = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}), []
    try:
        shared = make_trainer(**settings, num_workers=2, ray_address=machines.address, callbacks=[Join()])
        shared.train()
    finally:
        ray.shutdown()
        machines.shutdown()
    assert workers[1] == 1 and workers[-1] == 2
    assert adapter(shared) == adapter(alone)
