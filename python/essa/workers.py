"""Evaluating generations on Ray: workers with a model each, on this machine or on many.

The driver owns the search. A worker owns a copy of it, which follows by being told the recorded generations, so
a request names a generation, its prompts and some rows, and the answer is their rewards: no weights, no noise and no
candidates cross the network, however large the model. Chunks are cut as in one process, by the settings alone, and
whichever worker is free takes the next. So neither how many workers there are, nor their speed, nor their deaths show in
the result.

Requests and answers are JSON, compressed; their bytes are counted. Ray itself carries what a worker is made of (settings,
prompts, reward functions) from the driver's memory to the worker's; nothing is unpickled from disk.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import os
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from essa.chunks import Chunk, Task, evaluate_chunk, score_chunk
from essa.config import ESSAConfig, InputError
from essa.data import Prompts
from essa.evaluate import complete_and_rate
from essa.models import ModelSource, weight_digests
from essa.rewards import Answer, Reward, Rewards
from essa.rollout import batches
from essa.search import Search, of_weights
from essa_kernels.nn import POINT

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least; requests and answers are too small to go through it
ATTEMPTS = 5
# An idle worker takes over what another has been at for this many seconds, and times as long as is usual.
LATE_SECONDS, LATE_TIMES = 5.0, 3.0


class WorkerError(InputError):
    """The workers cannot go on. The run itself is intact and can be resumed."""


@dataclass(frozen=True)
class Recipe:
    """What a worker is made of.

    Attributes:
        weights: digests of the driver's.
    """

    source: ModelSource
    args: ESSAConfig
    processing_class: PreTrainedTokenizerBase | None
    prompts: Prompts
    eval_prompts: Prompts | None
    reward_funcs: str | Reward | Sequence[str | Reward]
    weights: dict[str, str]


class Replica:
    """A worker, but for Ray: a search that follows the driver's, on a model of its own."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._answers: dict[tuple[int, range], list[Answer]] = {}

    def start(self) -> None:
        """Load the model.

        Raises:
            InputError: it cannot be loaded here, or is not the driver's.
        """
        recipe, args, source = self._recipe, self._recipe.args, self._recipe.source
        torch.set_num_threads(args.threads_per_worker)
        if (args.gpus_per_worker or 0) > 1:
            source = dataclasses.replace(source, device="balanced")
        model, tokenizer = source.load(of_weights=of_weights(args))
        self._check_weights(model)
        self._search = Search(model, args)
        self._state = TrainerState(max_steps=args.generations)
        self._task = Task(
            model.eval(),
            recipe.processing_class or tokenizer,
            recipe.prompts,
            recipe.eval_prompts,
            Rewards(recipe.reward_funcs, args.reward_weights, args.reward_timeout),
            args.max_new_tokens,
            args.seed,
            args.row_budget,
        )

    def _check_weights(self, model: Any) -> None:
        """Candidates, which are compared later, tell only of the weights that are searched."""
        source = self._recipe.source
        for part, digest in weight_digests(model).items():
            if digest != self._recipe.weights[part]:
                name = source.adapter if part == "adapter" else source.name
                raise InputError(
                    f"{name!r} has other weights for a worker than for the driver; do all machines have the same files?"
                )

    def evaluate(self, request: bytes) -> bytes:
        """Rewards of some rows. Raises RewardError."""
        asked = self._follow(request)
        step, rows = asked["generation"], range(*asked["rows"])
        if self._search.digest(step) != asked["candidates"]:
            raise WorkerError(
                f"generation {step}: a worker's candidates are not the driver's; do all machines have the same "
                "versions of numpy, cma and essa-kernels, and the same kind of processor?"
            )
        chunk = self._evaluate(step, asked["prompts"], rows, asked["epoch"])
        return pack({name: getattr(chunk, name) for name in ("rewards", "tokens", "seconds", "metrics", "halved")})

    def score(self, request: bytes) -> bytes:
        """Scores of some rows' completions."""
        asked = self._follow(request)
        step, rows = asked["generation"], range(*asked["rows"])
        if (step, rows) not in self._answers:  # another worker, dead by now, gave the answers
            self._evaluate(step, asked["prompts"], rows, asked["epoch"])
        question = self._search.asked(step, np.array(asked["rewards"]), asked["scores"])
        assert question is not None, "the driver's strategy has a question, and this one is its copy"
        answers = self._answers[step, rows]
        places, scores = score_chunk(self._task, self._search, asked["prompts"], rows, answers, *question)
        return pack({"places": places.tolist(), "scores": scores})

    def measure(self, request: bytes) -> bytes:
        """Rewards of the search's solution on some of the prompts to evaluate on. Raises RewardError."""
        asked, task = self._follow(request), self._task
        assert task.eval_prompts is not None, "the driver evaluates on the same prompts"
        self._state.global_step, self._state.epoch = asked["generation"], asked["epoch"]
        rated, tokens = complete_and_rate(
            task.model,
            task.processing_class,
            task.eval_prompts,
            task.rewards,
            space=self._search.space,
            values=POINT,
            max_new_tokens=task.max_new_tokens,
            row_budget=task.row_budget,
            rows=range(*asked["rows"]),
            trainer_state=self._state,
        )
        return pack({"rewards": rated.tolist(), "tokens": tokens})

    def _follow(self, request: bytes) -> dict[str, Any]:
        asked = unpack(request)
        for record in asked["history"]:
            if record["generation"] == self._search.generation:
                self._search.replay(record)
        return asked

    def _evaluate(self, step: int, chosen: list[int], rows: range, epoch: float) -> Chunk:
        self._state.global_step, self._state.epoch = step, epoch
        chunk = evaluate_chunk(self._task, self._search, step, chosen, rows, self._state)
        self._answers = {key: answers for key, answers in self._answers.items() if key[0] == step}
        self._answers[step, rows] = chunk.answers
        return chunk


@dataclass(eq=False)
class Worker:
    """A Ray actor as the driver sees it.

    Attributes:
        actor: the handle.
        starting: what says that its model is loaded; None once it is.
        told: how many generations of the history it has been sent.
        sent: bytes of this generation's requests and answers.
    """

    actor: Any
    starting: Any
    told: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Job:
    """What a worker is at: some rows, for one purpose, since when."""

    worker: Worker
    rows: range
    purpose: object
    since: float = field(default_factory=time.monotonic)


class Workers:
    """Evaluates generations on Ray workers. Takes the place of `essa.chunks.Local`.

    Args:
        recipe: what every worker is made of.
        search: the driver's search.
    """

    def __init__(self, recipe: Recipe, search: Search) -> None:
        self._recipe, self._search = recipe, search
        self._history: list[dict[str, Any]] = []
        self._workers: list[Worker] = []
        self._owners: dict[range, Worker] = {}
        self._running: dict[Any, Job] = {}
        self._asked: dict[str, Any] = {}
        self._scores: list[list[float]] = []
        self.lost = 0
        """Workers that died so far."""

    def evaluate(self, step: int, chosen: list[int], state: Any = None) -> Chunk:
        """All rows of generation ``step``.

        Raises:
            RewardError: a reward function failed.
            InputError: there is no Ray, or a worker could not load its model.
            WorkerError: the workers keep dying, or compute something else than the driver.
        """
        started = time.perf_counter()
        for worker in self._workers:
            worker.sent = 0
        self._owners, self._scores = {}, []
        self._asked = {"generation": step, "prompts": chosen, "epoch": state.epoch if state else 0.0}
        rows = self._search.chunks(len(chosen))
        replies = self._map("evaluate", rows, {"candidates": self._search.digest(step)})
        chunk = Chunk.join([Chunk(**replies[part], answers=[]) for part in rows])
        members = self._recipe.args.population_size
        self._asked["rewards"] = np.array(chunk.rewards).reshape(members, -1).tolist()
        return dataclasses.replace(chunk, seconds=time.perf_counter() - started)

    def score(self, members: np.ndarray, offsets: np.ndarray) -> list[float]:
        """`Score`, about the generation evaluated last. The workers know the question: their searches ask it too."""
        scores = np.empty(len(members))
        for reply in self._map("score", list(self._owners), {"scores": self._scores}).values():
            scores[reply["places"]] = reply["scores"]
        self._scores.append(scores.tolist())
        return self._scores[-1]

    def measure(self, state: Any = None) -> dict[str, float]:
        """`essa.evaluate.evaluate` of the search's solution."""
        started = time.perf_counter()
        prompts = self._recipe.eval_prompts
        assert prompts is not None, "measure needs prompts to evaluate on"
        self._owners = {}
        self._asked = {"generation": self._search.generation, "epoch": state.epoch if state else 0.0}
        rows = batches(range(len(prompts)), self._recipe.args.row_budget)
        replies = self._map("measure", rows, {})
        rated = np.concatenate([replies[part]["rewards"] for part in rows])
        return {
            "reward": float(rated.mean()),
            "samples": len(rated),
            "tokens": sum(replies[part]["tokens"] for part in rows),
            "seconds": time.perf_counter() - started,
        }

    def told(self, record: dict[str, Any]) -> None:
        """The search has been told a generation, as recorded; the workers hear of it with their next request."""
        self._history.append(
            {key: record[key] for key in ("generation", "candidates", "rewards", "scores") if key in record}
        )

    def forget(self) -> None:
        """The search starts anew."""
        self._history = []

    def traffic(self) -> dict[str, int]:
        """What crossed the network in the generation evaluated last: the most bytes of a worker, and of how many."""
        return {
            "workers": len(self._workers),
            "bytes_per_worker": max((worker.sent for worker in self._workers), default=0),
        }

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """There are workers inside.

        Raises:
            InputError: there is no Ray, no such cluster, or no worker has room in it.
        """
        disconnect = connect(self._recipe.args)
        try:
            self._check_room()
            self._workers = [self._new_worker() for _ in range(self._recipe.args.num_workers)]
            yield
        finally:
            for worker in self._workers:
                _kill(worker)
            self._workers, self._running = [], {}
            disconnect()

    def _takes(self) -> dict[str, float]:
        """What a worker takes, by Ray's names."""
        import ray

        gpus = self._recipe.args.gpus_per_worker
        if gpus is None:
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
        return {"CPU": self._recipe.args.threads_per_worker, "GPU": gpus}

    def _check_room(self) -> None:
        """Ray itself would let workers wait for ever, without a word. Nodes may join a cluster, but not this machine."""
        import ray

        takes, wanted = self._takes(), self._recipe.args.num_workers
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(int(min(node.get(name, 0) / n for name, n in takes.items() if n)) for node in nodes)
        if room >= wanted:
            return
        worker = (
            f"a worker takes {takes['CPU']:g} CPUs (threads_per_worker) and {takes['GPU']:g} GPUs (gpus_per_worker)"
        )
        if room == 0 and self._recipe.args.ray_address is None:
            largest = ", ".join(f"{max(node.get(name, 0) for node in nodes):g} {name}s" for name in takes)
            raise InputError(f"{worker}, but no node of Ray's has that; the most of a node are {largest}")
        logger.warning("%s: there is room for %d of num_workers %d, the others wait for more", worker, room, wanted)

    def _new_worker(self) -> Worker:
        import ray

        takes, replica = self._takes(), cast(Any, ray.remote(Replica))
        actor = replica.options(num_cpus=takes["CPU"], num_gpus=takes["GPU"]).remote(self._recipe)
        return Worker(actor, actor.start.remote())

    def _map(self, method: str, jobs: list[range], asked: dict[str, Any]) -> dict[range, dict[str, Any]]:
        """Every job done by some worker. A job whose worker died, or is far too late, is done by another too."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        waiting = collections.deque(jobs)
        failures: collections.Counter[range] = collections.Counter()
        replies: dict[range, dict[str, Any]] = {}
        took: list[float] = []
        purpose = object()
        while len(replies) < len(jobs):
            for worker in self._idle():
                rows = self._next_job(worker, waiting) or self._late_job(purpose, replies, took)
                if rows is not None:
                    self._running[self._send(worker, method, rows, asked)] = Job(worker, rows, purpose)
            starting = {worker.starting: worker for worker in self._workers if worker.starting is not None}
            done, _ = ray.wait([*self._running, *starting], num_returns=1, timeout=1.0)
            for reference in done:
                try:
                    reply = ray.get(reference)
                except RayTaskError as error:
                    raise error.cause from None
                except RayError as error:
                    worker = starting.get(reference) or self._running[reference].worker
                    for rows in self._replace(worker, purpose, error):
                        failures[rows] += 1
                        if failures[rows] == ATTEMPTS:
                            raise WorkerError(f"{ATTEMPTS} workers died of rows {rows.start} to {rows[-1]}") from error
                        if rows not in replies:
                            waiting.appendleft(rows)
                    continue
                if reference in starting:
                    starting[reference].starting = None
                    continue
                job = self._running.pop(reference)
                job.worker.sent += len(reply)
                if job.purpose is purpose and job.rows not in replies:
                    replies[job.rows] = unpack(reply)
                    self._owners[job.rows] = job.worker
                    took.append(time.monotonic() - job.since)
        return replies

    def _idle(self) -> list[Worker]:
        busy = [job.worker for job in self._running.values()]
        return [worker for worker in self._workers if worker.starting is None and worker not in busy]

    def _next_job(self, worker: Worker, waiting: collections.deque[range]) -> range | None:
        """The first job that is nobody's, or this worker's, because it gave the answers that the job is about."""
        for job in waiting:
            owner = self._owners.get(job)
            if owner is None or owner is worker or owner not in self._workers:
                waiting.remove(job)
                return job
        return None

    def _send(self, worker: Worker, method: str, job: range, asked: dict[str, Any]) -> Any:
        body = {**self._asked, **asked, "rows": [job.start, job.stop], "history": self._history[worker.told :]}
        request = pack(body)
        worker.told = len(self._history)
        worker.sent += len(request)
        return getattr(worker.actor, method).remote(request)

    def _late_job(self, purpose: object, replies: dict[range, Any], took: list[float]) -> range | None:
        """Rows that a worker has been at for much longer than is usual, and no other worker is."""
        at_work = [job for job in self._running.values() if job.purpose is purpose and job.rows not in replies]
        many = collections.Counter(job.rows for job in at_work)
        limit = max(LATE_SECONDS, LATE_TIMES * statistics.median(took)) if took else math.inf
        late = [job.rows for job in at_work if time.monotonic() - job.since > limit and many[job.rows] == 1]
        return late[0] if late else None

    def _replace(self, worker: Worker, purpose: object, error: Exception) -> list[range]:
        """Put a new worker in the place of one that died, and return the rows it was at."""
        self.lost += 1
        logger.warning("a worker died, another takes its place: %s", str(error).strip().splitlines()[0])
        _kill(worker)
        self._workers[self._workers.index(worker)] = self._new_worker()
        lost = [job for job in self._running.values() if job.worker is worker]
        self._running = {reference: job for reference, job in self._running.items() if job.worker is not worker}
        return [job.rows for job in lost if job.purpose is purpose]


def connect(args: ESSAConfig) -> Callable[[], None]:
    """Connect to the Ray cluster, or start one that only this machine can reach. Returns what ends that.

    Raises:
        InputError: Ray is not installed, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers yield to whatever else runs, unless told that they are what the machine is for.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if args.ray_address is None:
        # Ray takes this machine for the loopback address only if told that there will be no cluster.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError("num_workers needs Ray: pip install 'essa-kernels[ray]'") from error
    if ray.is_initialized():
        return lambda: None
    own: dict[str, Any] = {
        "num_cpus": args.num_workers * args.threads_per_worker,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": LOOPBACK,
    }
    options = {"address": args.ray_address} if args.ray_address else own
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"ray_address {args.ray_address!r}: no Ray cluster there: {error}") from error
    if args.ray_address is None and ray.util.get_node_ip_address() != LOOPBACK:
        ray.shutdown()
        raise InputError(
            "Ray was imported before it could be told to listen on the loopback address alone; set the environment "
            "variable RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, or give ray_address"
        )
    return ray.shutdown


def pack(body: dict[str, Any]) -> bytes:
    """Numbers come back exactly: JSON writes the shortest text that reads as the same float."""
    return zlib.compress(json.dumps(body, separators=(",", ":")).encode())


def unpack(message: bytes) -> dict[str, Any]:
    return json.loads(zlib.decompress(message))


def _kill(worker: Worker) -> None:
    import ray

    ray.kill(worker.actor)
