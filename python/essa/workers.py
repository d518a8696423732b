"""Evaluating generations on Ray: workers with a model each, on this machine or on many.

The driver owns the search. A worker owns a copy of it, which follows by being told the recorded generations, as far as the
strategy needs them. A request names rows of the generation that is asked about, and the answer is their rewards: no weights,
no noise and no candidates cross the network, however large the model. Chunks are cut as in one process, by the settings
alone, and whichever worker is free takes the next. So neither how many workers there are, nor their speed, nor their deaths
show in the result.

A worker hears each piece of news once, with its next request; its bytes, with those of requests and answers, are counted.
The generations that a new or late worker missed are sent ahead in slices, and counted apart. Ray itself carries what a
worker is made of (settings, prompts, reward functions) from the driver's memory to the worker's; nothing is unpickled from
disk.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import os
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from essa.chunks import Chunk, places_of
from essa.config import ESSAConfig, InputError
from essa.messages import pack, unpack
from essa.replica import Recipe, Replica, WorkerError
from essa.rollout import batches
from essa.search import Search

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least; requests and answers are too small to go through it
SLICE_BYTES = 32 * 2**10
ATTEMPTS = 5
CONNECT_SECONDS = 5.0
# An idle worker takes over what another has been at for this many seconds, and times as long as is usual.
LATE_SECONDS, LATE_TIMES = 5.0, 3.0


@dataclass(eq=False)
class Worker:
    """A Ray actor as the driver sees it.

    Attributes:
        actor: the handle.
        starting: what says that its model is loaded; None once it is.
        attempt: how many in a row, with itself, tried to load their model in its place.
        told: how many generations of the history it has been sent.
        heard: how many of the news about the generation that is asked about.
        sent: bytes of the requests, news and answers since the traffic was last counted.
        caught_up: bytes since then of the generations that it had missed.
    """

    actor: Any
    starting: Any
    attempt: int = 1
    told: int = 0
    heard: int = 0
    sent: int = 0
    caught_up: int = 0


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
        self._history: list[bytes] = []
        self._workers: list[Worker] = []
        self._owners: dict[range, Worker] = {}
        self._running: dict[Any, Job] = {}
        self._news: list[bytes] = []
        self._chosen: list[int] = []
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
        self._chosen = chosen
        rows = self._search.chunks(len(chosen))
        digest = self._search.digest(step)
        replies = self._ask("evaluate", rows, state, generation=step, prompts=chosen, candidates=digest)
        rewards = np.concatenate([replies[part]["rewards"] for part in rows])
        parts = [
            Chunk(reply["rewards"].tolist(), [], reply["tokens"], 0.0, reply.get("metrics", {}), reply.get("halved", 0))
            for reply in (replies[part] for part in rows)
        ]
        needed = self._search.condensed(rewards.reshape(self._recipe.args.population_size, -1))
        self._news.append(pack({"rewards": needed}))
        return dataclasses.replace(Chunk.join(parts), seconds=time.perf_counter() - started)

    def score(self, members: np.ndarray, offsets: np.ndarray) -> list[float]:
        """`Score`, about the generation evaluated last. The workers know the question: their searches ask it too."""
        scores = np.empty(len(members))
        for rows, reply in self._map("score", list(self._owners)).items():
            scores[places_of(self._search, rows, len(self._chosen), members)] = reply["scores"]
        self._news.append(pack({"scores": scores}))
        return scores.tolist()

    def measure(self, state: Any = None) -> dict[str, float]:
        """`essa.evaluate.evaluate` of the search's solution."""
        started = time.perf_counter()
        prompts = self._recipe.eval_prompts
        assert prompts is not None, "measure needs prompts to evaluate on"
        rows = batches(range(len(prompts)), self._recipe.args.row_budget)
        replies = self._ask("measure", rows, state, generation=self._search.generation)
        rated = np.concatenate([replies[part]["rewards"] for part in rows])
        return {
            "reward": float(rated.mean()),
            "samples": len(rated),
            "tokens": sum(replies[part]["tokens"] for part in rows),
            "seconds": time.perf_counter() - started,
        }

    def told(self, record: dict[str, Any]) -> None:
        """The search has been told a generation, as recorded; the workers hear of it with their next request."""
        needed = {
            "generation": record["generation"],
            "candidates": record["candidates"],
            "rewards": self._search.condensed(np.array(record["rewards"], dtype=np.float64)),
            "scores": [np.array(scores) for scores in record.get("scores", [])],
        }
        self._history.append(pack({"told": needed}))

    def forget(self) -> None:
        """The search starts anew."""
        self._history = []

    def traffic(self) -> dict[str, int]:
        """What crossed the network since this was last asked: the most bytes of a worker, and of how many; and the most that
        a worker was sent of generations that it had missed, where there was one."""
        counted = {
            "workers": len(self._workers),
            "bytes_per_worker": max((worker.sent for worker in self._workers), default=0),
        }
        caught_up = max((worker.caught_up for worker in self._workers), default=0)
        for worker in self._workers:
            worker.sent = worker.caught_up = 0
        return {**counted, "catch_up_bytes": caught_up} if caught_up else counted

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """There are workers inside.

        Raises:
            InputError: there is no Ray, no such cluster, no worker has room in it, or the first could not load its model.
        """
        disconnect = connect(self._recipe.args)
        try:
            self._check_room()
            self._workers = [self._new_worker() for _ in range(self._recipe.args.num_workers)]
            self._wait_for_one()
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

    def _new_worker(self, attempt: int = 1) -> Worker:
        import ray

        takes, replica = self._takes(), cast(Any, ray.remote(Replica))
        actor = replica.options(num_cpus=takes["CPU"], num_gpus=takes["GPU"]).remote(self._recipe)
        return Worker(actor, actor.start.remote(), attempt)

    def _wait_for_one(self) -> None:
        """Until a worker has loaded its model. One that died, before it could, is replaced once there is work."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        (first, *_), _ = ray.wait([worker.starting for worker in self._workers], num_returns=1)
        try:
            ray.get(first)
        except RayTaskError as error:
            raise error.cause from None
        except RayError:
            return

    def _ask(self, method: str, jobs: list[range], state: Any, **asked: Any) -> dict[range, dict[str, Any]]:
        """`_map` of jobs about something new."""
        self._news = [pack({"asked": {**asked, "epoch": state.epoch if state else 0.0}})]
        self._owners = {}
        for worker in self._workers:
            worker.heard = 0
        return self._map(method, jobs)

    def _map(self, method: str, jobs: list[range]) -> dict[range, dict[str, Any]]:
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
                limit = max(LATE_SECONDS, LATE_TIMES * statistics.median(took)) if took else math.inf
                rows = self._next_job(worker, waiting, purpose, limit) or self._late_job(purpose, replies, limit)
                if rows is not None:
                    self._running[self._send(worker, method, rows)] = Job(worker, rows, purpose)
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
                    for worker in self._workers:
                        worker.attempt = 1
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

    def _next_job(
        self, worker: Worker, waiting: collections.deque[range], purpose: object, limit: float
    ) -> range | None:
        """The first job that is nobody's, or this worker's, because it gave the answers that the job is about; if there is
        none, the first of a worker that is stuck: at what others answered before this was asked, or at it beyond the limit.
        """
        now = time.monotonic()
        stuck = [job.worker for job in self._running.values() if job.purpose is not purpose or now - job.since > limit]
        others = [owner for owner in self._workers if owner is not worker]
        for held in (others, [owner for owner in others if owner not in stuck]):
            for job in waiting:
                if self._owners.get(job) not in held:
                    waiting.remove(job)
                    return job
        return None

    def _send(self, worker: Worker, method: str, job: range) -> Any:
        untold = self._history[worker.told :]
        for part in _slices(untold[:-1]):
            worker.actor.hear.remote(part)
            worker.caught_up += sum(map(len, part))
        news = untold[-1:] + self._news[worker.heard :]
        request = pack({"rows": [job.start, job.stop]})
        worker.told, worker.heard = len(self._history), len(self._news)
        worker.sent += len(request) + sum(map(len, news))
        return getattr(worker.actor, method).remote(request, news)

    def _late_job(self, purpose: object, replies: dict[range, Any], limit: float) -> range | None:
        """Rows that a worker has been at for longer than the limit, and no other worker is."""
        at_work = [job for job in self._running.values() if job.purpose is purpose and job.rows not in replies]
        many = collections.Counter(job.rows for job in at_work)
        late = [job.rows for job in at_work if time.monotonic() - job.since > limit and many[job.rows] == 1]
        return late[0] if late else None

    def _replace(self, worker: Worker, purpose: object, error: Exception) -> list[range]:
        """Put a new worker in the place of one that died, and return the rows it was at.

        Raises:
            WorkerError: as its predecessors did, it died while loading its model.
        """
        self.lost += 1
        reason = str(error).strip().splitlines()[0]
        attempt = 1
        if worker.starting is not None:
            if worker.attempt == ATTEMPTS:
                raise WorkerError(
                    f"{ATTEMPTS} workers in a row died while loading their model; is there enough memory for "
                    f"num_workers {self._recipe.args.num_workers} copies of it? The last: {reason}"
                ) from error
            attempt = worker.attempt + 1
        logger.warning("a worker died, another takes its place: %s", reason)
        _kill(worker)
        self._workers[self._workers.index(worker)] = self._new_worker(attempt)
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
    if args.ray_address:
        _check_listening(args.ray_address)
    options = {"address": args.ray_address} if args.ray_address else own
    try:
        with _signals_stay():
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


def _check_listening(address: str) -> None:
    """Raise `InputError` if nobody answers there: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except ValueError:
        raise InputError(f"ray_address must be auto or host:port, got {address!r}") from None
    except OSError as error:
        raise InputError(f"ray_address {address!r}: no Ray cluster there: {error}") from error


@contextlib.contextmanager
def _signals_stay() -> Iterator[None]:
    """Ray takes SIGTERM for itself, natively too: the process would abort with a dump, without a word of how to resume."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def _slices(messages: list[bytes]) -> Iterator[list[bytes]]:
    """Messages in order, as many at a time as `SLICE_BYTES` hold, and at least one."""
    part: list[bytes] = []
    for message in messages:
        if part and sum(map(len, part)) + len(message) > SLICE_BYTES:
            yield part
            part = []
        part.append(message)
    if part:
        yield part


def _kill(worker: Worker) -> None:
    import ray

    ray.kill(worker.actor)
