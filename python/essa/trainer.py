"""`ESSATrainer`: align a language model without gradients, by searching its LoRA adapter or its weights.

One generation: the strategy asks for candidates, the whole population answers the same prompts in batched forward
passes, the reward functions rate the answers, the strategy is told. The call shape is that of TRL's `GRPOTrainer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState

import essa_kernels
from essa.checkpoint import RUN_FILE, Run, SaveError, check_resumed_folder
from essa.chunks import Local, Task
from essa.config import ESSAConfig, InputError
from essa.data import Prompts, PromptSampler
from essa.evaluate import check_prompts
from essa.models import ModelSource, check_model, fingerprint, has_lora, tokenizer_of, weight_digests, with_adapter
from essa.progress import Progress, stderr_console
from essa.recorded import resume_command
from essa.rewards import Reward, RewardError, Rewards
from essa.row_budget import choose_row_budget
from essa.search import Search, of_weights
from essa.workers import Recipe, WorkerError, Workers

logger = logging.getLogger(__name__)


class ESSATrainer:
    """Search the singular values of a LoRA adapter, or what else `args.parametrization` names, for the highest reward.

    Args:
        model: name or folder of a base model, a `ModelSource`, a `PeftModel`, or a transformers model that carries a LoRA
            adapter.
        reward_funcs: one or more reward functions with TRL's signature, built-in names (`exact_match`, `math`) or
            `path.to.module:function`.
        args: the settings; None takes the defaults and writes to `<model>-ESSA`.
        train_dataset: `datasets.Dataset` or list of rows with a `prompt` (text or messages); further columns go to the
            reward functions.
        eval_dataset: the same, for evaluating the search's mean; never searched on.
        processing_class: the tokenizer; None loads the model's own.
        callbacks: transformers `TrainerCallback`s. One step is one generation.
        adapter: folder or name of the warm-start LoRA, when `model` does not carry one. Where the weights are searched, it
            is merged into them, and there may be none.

    Raises:
        InputError: anything given cannot be used. Nothing has been written by then.
    """

    def __init__(
        self,
        model: str | ModelSource | PreTrainedModel | PeftModel,
        reward_funcs: str | Reward | Sequence[str | Reward],
        args: ESSAConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        adapter: str | None = None,
    ) -> None:
        if not isinstance(model, (str, ModelSource)):
            check_model(model)
        if args is None:
            args = ESSAConfig(output_dir=f"{Path(_model_name(model)).name or type(model).__name__}-ESSA")
        if args.load_best_model_at_end and eval_dataset is None:
            raise InputError("load_best_model_at_end needs an eval_dataset")
        self.args = args
        self.rewards = Rewards(reward_funcs, args.reward_weights, args.reward_timeout)
        source = _source(model, adapter, args)
        self.model, self.processing_class = _load(model, adapter, processing_class, source, args)
        if train_dataset is None:
            raise InputError("train_dataset must be given")
        self._check = functools.partial(
            check_prompts,
            model=self.model,
            processing_class=self.processing_class,
            rewards=self.rewards,
            max_new_tokens=args.max_new_tokens,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        self.train_prompts: Prompts = self._check(train_dataset, name="train_dataset")
        self.eval_prompts: Prompts | None = None
        if eval_dataset is not None:
            self.eval_prompts = self._check(eval_dataset, name="eval_dataset")
        self._sampler = PromptSampler(len(self.train_prompts), args.prompts_per_generation, args.seed)
        self.search = Search(self.model, args)
        if args.row_budget == "auto":  # type: ignore[comparison-overlap]
            args.row_budget = self._choose_row_budget()
        self._fingerprint = fingerprint(self.model)
        self._task = Task(
            self.model,
            self.processing_class,
            self.train_prompts,
            self.eval_prompts,
            self.rewards,
            args.max_new_tokens,
            args.seed,
            args.row_budget,
        )
        self._evaluator: Local | Workers = Local(self._task, self.search)
        self._workers: Workers | None = None
        if args.num_workers:
            if source is None:
                raise InputError("num_workers needs a model given by name: every worker loads its own")
            self._workers = Workers(
                Recipe(
                    source,
                    args,
                    processing_class,
                    self.train_prompts,
                    self.eval_prompts,
                    reward_funcs,
                    weight_digests(self.model),
                ),
                self.search,
            )
            chunks = len(self.search.chunks(args.prompts_per_generation))
            if chunks < args.num_workers:
                logger.warning(
                    "num_workers: a generation is %d chunks of row_budget %d, so %d of %d workers have nothing to do; "
                    "a smaller row_budget makes more chunks",
                    chunks,
                    args.row_budget,
                    args.num_workers - chunks,
                    args.num_workers,
                )
        self.callbacks: list[TrainerCallback] = []
        for callback in [*(callbacks or ()), *_reporters(args.report_to)]:
            self.add_callback(callback)
        self.about: dict[str, Any] = {}
        """Further facts for `run.json`, such as the command that started the run."""
        self._reset()
        self._emit("on_init_end")

    def _choose_row_budget(self) -> int:
        """What the run in `output_dir` was started with, or the fastest here and now."""
        args = self.args
        if Path(args.output_dir, RUN_FILE).exists():
            return Run.read(args.output_dir).identity["settings"]["row_budget"]
        rows, rates = choose_row_budget(
            self.model,
            self.processing_class,
            self.search.space,
            self.train_prompts.texts,
            most=self.search.rows(args.prompts_per_generation),
            max_new_tokens=args.max_new_tokens,
        )
        if args.progress:
            tried = ", ".join(f"{size}: {rate:,.0f}" for size, rate in rates.items())
            stderr_console().print(
                f"row_budget auto: {rows} sequences to a batch (tokens/s for each size tried: {tried})", soft_wrap=True
            )
        return rows

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, Any]:
        """Run the search and write `output_dir/adapter` (or `output_dir/model`) and the report.

        Args:
            resume_from_checkpoint: True, or the run's folder (which must be `output_dir`), to continue a run. Its
                recorded generations are replayed, so it ends with the same adapter as an uninterrupted run.

        Returns:
            `generations`, `samples`, `tokens`, `seconds` (of the search, evaluations aside) and, with an evaluation
            set, `eval_reward_before`, `eval_reward` (of the saved adapter); with Ray workers `bytes_per_worker`, the most
            that a worker sent and got in a generation.

        Raises:
            InputError: the run cannot be started or resumed.
            RewardError: a reward function failed. The run can be resumed.
            SaveError: the disk is full, for instance. The run can be resumed.
            WorkerError: Ray workers keep dying. The run can be resumed.
            KeyboardInterrupt: passed on. The run can be resumed.
        """
        self._reset()
        if not resume_from_checkpoint:
            Run.refuse_existing(self.args.output_dir)
        # Workers that cannot be are no reason to leave a run behind.
        with self._working(), contextlib.closing(self._open_run(resume_from_checkpoint)) as run:
            self._replay(run)
            last = list(self.evaluations.values())[-1:]
            metrics = {"eval_reward": last[0]["reward"]} if last else {}
            with Progress(self.args, self.state, metrics, enabled=self.args.progress) as progress:
                self._emit("on_train_begin")
                try:
                    self._search(run, progress)
                    if self._best is not None:
                        self.search.take(self._best)
                    self.save_model()
                except (RewardError, WorkerError) as error:
                    raise type(error)(f"{error}\n{self._how_to_resume()}") from error
                except OSError as error:
                    raise SaveError(f"the run cannot be written: {error}\n{self._how_to_resume()}") from error
                except KeyboardInterrupt:
                    progress.say(self._how_to_resume())
                    raise
                self.search.space.load_()
                self._emit("on_train_end")
        from essa.report import write_report

        write_report(self.args.output_dir)
        return self._summary()

    def evaluate(self, eval_dataset: Any = None, *, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Greedy completions of the current mean: `eval_reward` and what it took.

        Args:
            eval_dataset: as the constructor's, which is the default.
            metric_key_prefix: takes the place of `eval`.
        """
        evaluator = self._evaluator
        if eval_dataset is not None:
            prompts = self._check(eval_dataset, name="eval_dataset")
            evaluator = Local(dataclasses.replace(self._task, eval_prompts=prompts), self.search)
        elif self.eval_prompts is None:
            raise InputError("evaluate() needs an eval_dataset")
        return {f"{metric_key_prefix}_{name}": value for name, value in evaluator.measure(self.state).items()}

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers callback, or one of a class.

        Raises:
            InputError: it is none, or could do nothing in this run.
        """
        made = callback() if isinstance(callback, type) else callback
        if not isinstance(made, TrainerCallback):
            raise InputError(f"callbacks must be transformers TrainerCallbacks, got {type(made).__name__}")
        if isinstance(made, EarlyStoppingCallback) and (self.eval_prompts is None or not self.args.eval_steps):
            raise InputError("callbacks: EarlyStoppingCallback needs an eval_dataset, and eval_steps above 0")
        self.callbacks.append(made)

    def pop_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> TrainerCallback | None:
        """Take away a callback, or the first of a class, and return it; None if there is none."""
        for own in self.callbacks:
            if isinstance(own, callback) if isinstance(callback, type) else own is callback:
                self.callbacks.remove(own)
                return own
        return None

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Take away a callback, or the first of a class."""
        self.pop_callback(callback)

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the current mean, by default to `args.output_dir`: as an ordinary PEFT adapter folder, `adapter`, or where
        the weights are searched as a transformers model folder with its tokenizer, `model`."""
        space = self.search.space
        space.save(output_dir or Path(self.args.output_dir, space.output), self.processing_class)

    def _reset(self) -> None:
        self.search.reset()
        if self._workers is not None:
            self._workers.forget()
        self.state: TrainerState = TrainerState(
            max_steps=self.args.generations,
            logging_steps=self.args.logging_steps,
            eval_steps=self.args.eval_steps,
            save_steps=self.args.save_steps,
        )
        self.control = TrainerControl()
        for callback in self._stoppers():
            callback.early_stopping_patience_counter = 0
        self.samples, self.tokens, self.seconds, self.bytes_per_worker = 0, 0, 0.0, 0
        self.evaluations: dict[int, dict[str, float]] = {}
        self._best: Any = None

    # The run on disk

    def _open_run(self, resume: str | bool | None) -> Run:
        directory = Path(self.args.output_dir)
        if not resume:
            started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            return Run.create(directory, self._identity(), {"started": started, **self._about()})
        if not isinstance(resume, bool):
            check_resumed_folder(resume, directory)
        return Run.resume(directory, self._identity(), self._about())

    def _identity(self) -> dict[str, Any]:
        return {
            "settings": {**self.args.fixed(), **self.search.resolved()},
            "noise_version": essa_kernels.NOISE_VERSION,
            "model": {**self._fingerprint, "searched_values": self.search.dim},
            "dataset": self.train_prompts.fingerprint(),
            "eval_dataset": None if self.eval_prompts is None else self.eval_prompts.fingerprint(),
            "rewards": self.rewards.names,
        }

    def _about(self) -> dict[str, Any]:
        return {
            **self.about,
            "model": _model_name(self.model),
            "settings": self.args.to_dict(),
            "environment": essa_kernels.env_report(),
        }

    def _replay(self, run: Run) -> None:
        """Bring the search to where the history left it, by asking again and telling what was recorded."""
        for record in run.records:
            step = self.state.global_step
            if "evaluation" in record:
                self._emit_to(self._stoppers(), "on_evaluate", metrics=_metrics_of(record["evaluation"]))
                self._remember_evaluation(record)
                continue
            if record["generation"] != step or record["prompts"] != self._sampler.indices(step):
                raise InputError(f"the history in {str(run.directory)!r} is not one of this run: at generation {step}")
            if not self.search.replay(record):
                logger.warning(
                    "generation %d: the replayed candidates differ from the recorded ones (another machine or other "
                    "library versions?); the run continues, but not bit for bit as it would have",
                    step,
                )
            self._told(record)
        if self.state.global_step > self.args.generations:
            raise InputError(
                f"generations must be at least the {self.state.global_step} the run already has, "
                f"got {self.args.generations}"
            )

    def _how_to_resume(self) -> str:
        command = resume_command("align", self.args.output_dir, self.about.get("command", {}))
        return (
            f"Stopped after generation {self.state.global_step} of {self.args.generations}. Nothing told so far is "
            f"lost; resume with `{command}`, or with "
            f"trainer.train(resume_from_checkpoint=True) on the same trainer settings."
        )

    # The search

    def _search(self, run: Run, progress: Progress) -> None:
        if 0 not in self.evaluations:
            self._evaluate(run, progress)
        while self.state.global_step < self.args.generations and not self.control.should_training_stop:
            self._emit("on_step_begin")
            metrics = self._generation(run)
            step = self.state.global_step
            args = self.args
            last = step == args.generations
            self.control.should_log = step % args.logging_steps == 0 or last
            self.control.should_evaluate = args.eval_steps > 0 and step % args.eval_steps == 0
            self.control.should_save = args.save_steps > 0 and step % args.save_steps == 0
            self._emit("on_step_end")
            if self.control.should_evaluate:
                self._evaluate(run, progress)
            progress.update(metrics)
            if self.control.should_log:
                self._log(metrics)
                progress.log(metrics)
            if self.control.should_save:
                self.save_model()
                self._emit("on_save")
        if self.state.global_step not in self.evaluations:
            self._evaluate(run, progress)

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """The workers are there inside, if there are to be any."""
        if self._workers is None:
            yield
            return
        local, self._evaluator = self._evaluator, self._workers
        try:
            with self._workers.working():
                yield
        finally:
            self._evaluator = local

    def _generation(self, run: Run) -> dict[str, float]:
        started = time.perf_counter()
        step = self.state.global_step
        chosen = self._sampler.indices(step)
        chunk = self._evaluator.evaluate(step, chosen, self.state)
        if chunk.halved:
            logger.warning(
                "generation %d: chunks of row_budget %d did not fit into memory and were halved, %d times; the run goes on",
                step,
                self.args.row_budget,
                chunk.halved,
            )
        rewards = np.array(chunk.rewards).reshape(self.args.population_size, -1)
        record = {
            "generation": step,
            "prompts": chosen,
            "candidates": self.search.digest(step),
            "rewards": rewards.tolist(),
            "samples": rewards.size,
            "tokens": chunk.tokens,
            "rollout_seconds": chunk.seconds,
        }
        scores: list[list[float]] = []

        def score(members: np.ndarray, offsets: np.ndarray) -> np.ndarray:
            scores.append(self._evaluator.score(members, offsets))
            return np.array(scores[-1])

        self.search.tell(step, rewards, score)
        if scores:
            record["scores"] = scores
        if isinstance(self._evaluator, Workers):
            record |= self._evaluator.traffic()
        record["seconds"] = time.perf_counter() - started
        run.append(record)
        self._told(record)
        return {**self._metrics(record), **chunk.metrics}

    def _told(self, record: dict[str, Any]) -> None:
        if self._workers is not None:
            self._workers.told(record)
        self.samples += record["samples"]
        self.tokens += record["tokens"]
        self.seconds += record["seconds"]
        self.bytes_per_worker = max(self.bytes_per_worker, record.get("bytes_per_worker", 0))
        self.state.global_step = record["generation"] + 1
        self.state.epoch = self._sampler.epoch(self.state.global_step)

    def _metrics(self, record: dict[str, Any]) -> dict[str, float]:
        rewards = np.array(record["rewards"])
        # A member that answers a single prompt has no mean of its own to be the best of.
        own_prompt = self.search.strategy.assignment == "per_prompt"
        best = {} if own_prompt else {"reward_best": float(rewards.mean(axis=1).max())}
        return {
            "reward": float(rewards.mean()),
            **best,
            "reward_std": float(rewards.mean(axis=1).std()),
            "sigma": float(self.search.strategy.sigma),
            "completions/mean_length": record["tokens"] / record["samples"],
            "samples": self.samples,
            "num_tokens": self.tokens,
            "samples_per_second": record["samples"] / record["seconds"],
            "tokens_per_second": record["tokens"] / record["seconds"],
            "step_time": record["seconds"],
        }

    # Evaluation

    def _evaluate(self, run: Run, progress: Progress) -> None:
        if self.eval_prompts is None:
            return
        evaluation = self._evaluator.measure(self.state)
        record = {"step": self.state.global_step, "samples": self.samples, "evaluation": evaluation}
        run.append(record)
        metrics = _metrics_of(evaluation)
        progress.evaluated(metrics)
        self._log(metrics)
        # Callbacks compare it with the best before it.
        self._emit("on_evaluate", metrics=metrics)
        self._remember_evaluation(record)

    def _remember_evaluation(self, record: dict[str, Any]) -> None:
        step, evaluation = record["step"], record["evaluation"]
        self.evaluations[step] = evaluation
        metric, best = evaluation[self.args.metric_for_best_model], self.state.best_metric
        if best is None or (metric > best if self.args.greater_is_better else metric < best):
            self.state.best_metric, self.state.best_global_step = metric, step
            if self.args.load_best_model_at_end:
                self._best = self.search.keep()

    def _summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "generations": self.state.global_step,
            "samples": self.samples,
            "tokens": self.tokens,
            "seconds": self.seconds,
        }
        if self.bytes_per_worker:
            summary["bytes_per_worker"] = self.bytes_per_worker
        if self.evaluations:
            best = self.state.best_global_step if self.args.load_best_model_at_end else None
            summary["eval_reward_before"] = self.evaluations[0]["reward"]
            summary["eval_reward"] = self.evaluations[self.state.global_step if best is None else best]["reward"]
        return summary

    # Callbacks

    def _log(self, metrics: dict[str, float]) -> None:
        logs = {**metrics, "epoch": self.state.epoch}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self._emit("on_log", logs=logs)

    def _stoppers(self) -> list[EarlyStoppingCallback]:
        """Callbacks whose patience is part of the search: what they saw before a run was killed, they see again."""
        return [callback for callback in self.callbacks if isinstance(callback, EarlyStoppingCallback)]

    def _emit(self, event: str, **arguments: Any) -> None:
        self._emit_to(self.callbacks, event, **arguments)

    def _emit_to(self, callbacks: Sequence[TrainerCallback], event: str, **arguments: Any) -> None:
        for callback in callbacks:
            handler: Callable = getattr(callback, event)
            result = handler(
                self.args,
                self.state,
                self.control,
                model=self.model,
                processing_class=self.processing_class,
                **arguments,
            )
            if result is not None:
                self.control = result


def _metrics_of(evaluation: dict[str, float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in evaluation.items()}


def _source(model: Any, adapter: str | None, args: ESSAConfig) -> ModelSource | None:
    """Where a model given by name comes from; None for one that is there already."""
    if isinstance(model, ModelSource):
        return model
    if isinstance(model, str):
        return ModelSource(model, adapter, args.dtype, args.quantization, args.device)
    return None


def _load(
    model: Any,
    adapter: str | None,
    processing_class: Any,
    source: ModelSource | None,
    args: ESSAConfig,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    if source is not None:
        # Where workers do the computing, the GPUs are theirs.
        own = dataclasses.replace(source, device="cpu") if args.num_workers else source
        loaded, tokenizer = own.load(of_weights=of_weights(args))
        return loaded, processing_class or tokenizer
    if has_lora(model) and adapter is not None:
        raise InputError("adapter must not be given for a model that already carries a LoRA adapter")
    return with_adapter(model, adapter, of_weights=of_weights(args)).eval(), processing_class or tokenizer_of(model)


def _model_name(model: Any) -> str:
    if isinstance(model, ModelSource):
        return model.name
    return model if isinstance(model, str) else model.config._name_or_path


def _reporters(report_to: str | list[str]) -> list[TrainerCallback]:
    from transformers.integrations import get_reporting_integration_callbacks

    made = []
    for name in () if report_to == "none" else report_to:
        try:
            made += [kind() for kind in get_reporting_integration_callbacks(name)]
        except (RuntimeError, ImportError) as error:
            raise InputError(f"report_to {name!r} needs `pip install {name}`: {error}") from error
    return made
