"""`TRDPOTrainer`: transformers' Trainer with a preference loss and a reference that follows the policy."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from essa.checkpoint import SaveError
from essa.config import InputError
from essa.differentiable import make_differentiable, taken_by_trainer
from essa.models import bare, check_model, context_length, load_base, tokenizer_of
from essa.trdpo import losses
from essa.trdpo.batches import PACKED, PADDED, SHARED, Collator
from essa.trdpo.checkpoints import check_checkpoint, damage, last_sound_checkpoint, step_of, whole_checkpoints
from essa.trdpo.config import TRDPOConfig
from essa.trdpo.data import Preferences, read_preferences
from essa.trdpo.logprobs import install, sequence_sums, token_logps
from essa.trdpo.reference import MovingReference, check_trainable
from essa.trdpo.shared_prompt import branching, why_not

logger = logging.getLogger(__name__)

Dataset = Iterable[dict[str, Any]] | Preferences


class TRDPOTrainer(Trainer):
    """Preference alignment of a causal language model, by DPO, IPO or KTO, with a reference that may move (TR-DPO).

    Args:
        model: a name or folder, a transformers model, or a PeftModel whose active adapter is a trainable LoRA.
        ref_model: where the reference starts, of the policy's shape. By default it starts as the policy. Only its
            weights are taken.
        args: the settings.
        train_dataset: pairs (`prompt`, `chosen`, `rejected`) or, for kto, judged rows (`prompt`, `completion`,
            `label`); see `essa.trdpo.data` for the formats.
        eval_dataset: the same, or a dict of several.
        processing_class: the tokenizer; by default the model's.
        callbacks: transformers callbacks.
        optimizers: optimiser and schedule, where the arguments' own will not do.
        peft_config: a LoRA to put on the model. Without one, and without a PeftModel, the whole model is trained.

    Attributes:
        reference: the `MovingReference`.

    Checkpoints carry the reference. Dropout is off: policy and reference are compared, not regularised.

    Raises:
        InputError: an argument cannot be used; the message names it.
    """

    loss_is_scaled_for_ga = False
    args: TRDPOConfig
    model: Any

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: nn.Module | None = None,
        args: TRDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args or TRDPOConfig(output_dir="trdpo-output")
        if train_dataset is None:
            raise InputError("train_dataset is required")
        if not isinstance(ref_model, nn.Module | None):
            raise InputError(f"ref_model must be a model, loaded by its user, got {ref_model!r}")
        if ref_model is not None and ref_model is model:
            raise InputError("ref_model must be another model than the policy; leave it out to start from the policy")
        if not isinstance(model, str):
            check_model(model)
        # The adapter's first weights are random.
        set_seed(args.seed)
        if isinstance(model, str):
            model, tokenizer = load_base(model, device="cpu")
            processing_class = processing_class or tokenizer
        if processing_class is None:
            processing_class = tokenizer_of(model)
        if processing_class.pad_token_id is None:
            processing_class.pad_token = processing_class.eos_token
        check_attention(bare(model).config._attn_implementation, args.device)
        self._context = context_length(model)
        model = _with_adapter(model, peft_config)
        check_trainable(model)
        make_differentiable(model)
        _disable_dropout(model)
        self._kto = args.loss_type == "kto"
        self._batch_layout = SHARED if args.prompt_sharing else PACKED if args.padding_free else PADDED
        if self._batch_layout != PADDED and (reason := why_not(model)):
            twice = "prompts are computed twice, not shared, and " if args.prompt_sharing else ""
            logger.warning("%sbatches are padded: %s", twice, reason)
            self._batch_layout = PADDED
        self._tokenizer, self._max_length = processing_class, args.max_length
        if self._kto and args.per_device_train_batch_size < 2:
            raise InputError("per_device_train_batch_size must be at least 2 with loss_type kto, for its KL term")
        train = self._read(train_dataset, "train_dataset")
        install(model)
        with taken_by_trainer(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(processing_class.pad_token_id, self._batch_layout),
                train_dataset=train,
                eval_dataset=self._read_evaluation(eval_dataset),
                processing_class=processing_class,
                callbacks=list(callbacks or ()),
                optimizers=optimizers,
            )
        if self.args.n_gpu > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError(
                "the reference takes the place of whole weights: with several GPUs start one process each "
                "(torchrun or accelerate launch, DDP), not DataParallel, FSDP or DeepSpeed"
            )
        self.model_accepts_loss_kwargs = False
        self.reference = MovingReference(self.model, ref_model)
        self._sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._batches: list[dict[str, Tensor]] = []
        self.add_callback(_Steps(self))
        if args.precompute_ref_log_probs:
            self._precompute(train)
            for dataset in self._evaluation_sets():
                self._precompute(dataset)

    # Data

    def _read(self, dataset: Any, name: str) -> Preferences:
        if isinstance(dataset, Preferences):
            preferences = dataset
        else:
            preferences = read_preferences(
                dataset, self._tokenizer, name=name, kto=self._kto, max_length=self._max_length
            )
            preferences.report()
        if self._context:
            preferences.check_lengths(self._context)
        return preferences

    def _read_evaluation(self, dataset: Any) -> Any:
        if isinstance(dataset, dict):
            return {key: self._read(value, f"eval_dataset[{key!r}]") for key, value in dataset.items()}
        return None if dataset is None else self._read(dataset, "eval_dataset")

    def _evaluation_sets(self) -> list[Preferences]:
        given: Any = self.eval_dataset
        return list(given.values()) if isinstance(given, dict) else [] if given is None else [given]

    def _precompute(self, dataset: Preferences) -> None:
        size = self.args.per_device_eval_batch_size
        with torch.no_grad(), self._layout(), self.reference.applied():
            for start in range(0, len(dataset), size):
                examples = dataset[start : start + size]
                batch = self._prepare_inputs(self.data_collator(examples))
                for example, logps in zip(examples, self._logps(self.model, batch)[1].tolist(), strict=True):
                    example.reference = tuple(logps)

    # The loss

    def _layout(self) -> contextlib.AbstractContextManager[None]:
        return branching(self.model) if self._batch_layout != PADDED else contextlib.nullcontext()

    def _logps(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens [N] and of completions [B, 2]."""
        tokens = token_logps(model, batch)
        return tokens, sequence_sums(tokens, batch)

    def _reference_logps(self, batch: dict[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        if "reference_logps" in batch:
            return None, batch["reference_logps"]
        with torch.no_grad(), self.reference.applied():
            return self._logps(self.model, batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch; its metrics are kept until the next log."""
        args = self.args
        reference_tokens, reference = self._reference_logps(inputs)
        tokens, policy = self._logps(model, inputs)
        ratios = (policy - reference).float()
        if self._kto:
            kl = self.accelerator.gather(ratios[:, 1].detach().mean()).mean().clamp(min=0)
            loss = losses.kto(
                ratios[:, 0],
                kl,
                inputs["desirable"],
                args.beta,
                args.desirable_weight,
                args.undesirable_weight,
            ).mean()
        elif args.loss_type == "ipo":
            loss = losses.ipo(ratios[:, 0], ratios[:, 1], args.beta, inputs["lengths"][:, 1:]).mean()
        else:
            loss = losses.dpo(ratios[:, 0], ratios[:, 1], args.beta, args.label_smoothing).mean()
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss is {loss.item()} at", self.state.global_step + 1, [inputs])
        with torch.no_grad():
            self._keep(inputs, tokens.detach(), reference_tokens, policy.detach(), ratios.detach())
            if self._kto:
                self._add("kl/mismatched", kl, 1)
        return (loss, {"logps": policy}) if return_outputs else loss

    def _not_finite(self, what: str, step: int, batches: list[dict[str, Tensor]]) -> InputError:
        """The error that stops a run which has nothing finite to go on from; what it saved so far is finite."""
        saved = [path for path in whole_checkpoints(str(self.args.output_dir)) if step_of(path) < step]
        resume = f"; the last checkpoint is {str(saved[-1])!r}" if saved else ""
        rows = [row for batch in batches for row in batch["rows"].tolist()]
        return InputError(
            f"{what} step {step}, for rows {rows} of the dataset; learning_rate {self.args.learning_rate!r} may be too "
            f"high{resume}"
        )

    def check_gradients(self) -> None:
        """Raise `InputError` if the step that is about to be taken is along a gradient that is not finite."""
        # Under float16 an infinite gradient is the loss scaler's business: it leaves the step out.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not self.args.fp16 and not _finite(gradients):
            raise self._not_finite("the gradient is not finite at", self.state.global_step + 1, self._batches)

    def check_weights(self) -> None:
        """Raise `InputError` if the last step left weights that are not finite, which are not to be saved."""
        if not _finite([p.detach() for p in self.model.parameters() if p.requires_grad]):
            raise self._not_finite("the weights are not finite after", self.state.global_step, self._batches)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward, in the layout of the batches: gradient checkpointing runs the layers again."""
        self._batches.append(inputs)
        with self._layout():
            return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The loss of an evaluation batch. There are no predictions to return: logits are never made."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), self._layout():
            return self.compute_loss(model, inputs).detach(), None, None

    # Metrics

    def _keep(
        self, batch: dict[str, Tensor], tokens: Tensor, reference_tokens: Tensor | None, policy: Tensor, ratios: Tensor
    ) -> None:
        rewards = self.args.beta * ratios
        if self._kto:
            desirable = batch["desirable"]
            chosen, rejected = rewards[desirable, 0], rewards[~desirable, 0]
            correct = (rewards[:, 0] > 0) == desirable
            chosen_logps, rejected_logps = policy[desirable, 0], policy[~desirable, 0]
        else:
            chosen, rejected = rewards.unbind(1)
            correct = chosen > rejected
            chosen_logps, rejected_logps = policy.unbind(1)
            self._add("rewards/margins", (chosen - rejected).sum(), len(chosen))
        self._add("rewards/chosen", chosen.sum(), len(chosen))
        self._add("rewards/rejected", rejected.sum(), len(rejected))
        self._add("rewards/accuracies", correct.sum(), len(correct))
        self._add("logps/chosen", chosen_logps.sum(), len(chosen_logps))
        self._add("logps/rejected", rejected_logps.sum(), len(rejected_logps))
        if reference_tokens is None:
            return
        self._add_kl("kl/policy_reference", batch, tokens - reference_tokens)
        if not self.reference.moved:
            self._add_kl("kl/policy_initial", batch, tokens - reference_tokens)
        elif not self.model.training or self._logs_after_this_step():
            with self.reference.at_start():
                self._add_kl("kl/policy_initial", batch, tokens - token_logps(self.model, batch))

    def _logs_after_this_step(self) -> bool:
        return self.state.logging_steps > 0 and (self.state.global_step + 1) % self.state.logging_steps == 0

    def _add_kl(self, name: str, batch: dict[str, Tensor], ratio: Tensor) -> None:
        """KL per token, in nats, to second order: half the mean square of the log-ratio over the data's tokens."""
        own = batch["sequence"] % 2 == 0 if self._kto else torch.ones_like(batch["sequence"], dtype=torch.bool)
        self._add(name, 0.5 * ratio[own].square().sum(), own.sum())

    def _add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        sums = self._sums["train" if self.model.training else "eval"]
        pair = torch.stack((total.float(), torch.as_tensor(count, dtype=torch.float32, device=total.device)))
        sums[name] = sums[name] + pair if name in sums else pair

    def _averages(self, mode: str) -> dict[str, float]:
        sums = self._sums[mode]
        names = sorted(sums)
        if not names:
            return {}
        stacked = self.accelerator.gather(torch.stack([sums[name] for name in names])[None]).sum(0)
        means = {name: total / count for name, (total, count) in zip(names, stacked.tolist(), strict=True) if count}
        if self._kto and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        self._sums[mode] = {}
        return means

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the averages of everything since the last time and the state of the reference."""
        evaluation = any(name.startswith("eval_") for name in logs)
        averages = self._averages("eval" if evaluation else "train")
        if evaluation:
            prefix = next((name for name in logs if name.endswith("_loss")), "eval_loss").removesuffix("_loss")
            logs.update({f"{prefix}_{name}": value for name, value in averages.items()})
        elif averages:
            logs.update(averages)
            logs["reference/updates"] = self.reference.updates
            logs["reference/last_update"] = self.reference.last_update
            logs["reference/distance"] = self.reference.distance()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; a dataset given here is read like the constructor's."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._read_evaluation(eval_dataset)
        return super().evaluate(eval_dataset, *args, **kwargs)

    # Training and checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; afterwards output_dir holds the report.

        Args:
            resume_from_checkpoint: a checkpoint, or True for the last one in output_dir; if that is damaged, a warning
                says so, and the one before it is taken.

        Raises:
            InputError: a checkpoint cannot be resumed from, or something is not finite any more.
            SaveError: a checkpoint cannot be written, as when the disk is full; those before it are intact.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_sound_checkpoint(str(self.args.output_dir)))
        elif resume_from_checkpoint:
            check_checkpoint(Path(resume_from_checkpoint))
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.check_weights()
        if self.args.report and self.is_world_process_zero():
            from essa.trdpo.report import write_report

            write_report(self)
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        try:
            if self.args.should_save:
                # A folder that has a trainer state, which is written last, has everything.
                (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
                self.reference.save(
                    folder,
                    ref_update=self.args.ref_update,
                    ref_model_mixup_alpha=self.args.ref_model_mixup_alpha,
                    ref_model_sync_steps=self.args.ref_model_sync_steps,
                )
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if damage(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise SaveError(f"checkpoint {str(folder)!r} cannot be written: {error}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "its optimizer or schedule"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _reading(checkpoint, "its random state"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _reading(resume_from_checkpoint, "its weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        state = self.reference.load(resume_from_checkpoint)
        for name in ("ref_update", "ref_model_mixup_alpha", "ref_model_sync_steps"):
            if state.get(name) != getattr(self.args, name):
                logger.warning("resuming with %s %r, was %r", name, getattr(self.args, name), state.get(name))
        if not state["same_start"]:
            logger.warning(
                "the run in %r started from other weights: reference/distance and kl/policy_initial count from this "
                "run's",
                os.fspath(resume_from_checkpoint),
            )

    def report_rows(self) -> list[tuple[str, Any]]:
        """The method's settings and what is known of the data, for the report."""
        train: Any = self.train_dataset
        return [
            ("model", bare(self.model).config._name_or_path or type(bare(self.model)).__name__),
            ("trained", "a LoRA adapter" if isinstance(self.model, PeftModel) else "the whole model"),
            ("prompts", "shared by both completions" if self._batch_layout == SHARED else "for each completion"),
            ("batches", "padded" if self._batch_layout == PADDED else "without padding"),
            ("attention", bare(self.model).config._attn_implementation),
            ("training rows", len(train)),
            ("pairs whose completions are identical", train.identical),
            ("rows cut to max_length", train.truncated),
            *((f.name, getattr(self.args, f.name)) for f in dataclasses.fields(self.args) if f.name in SHOWN),
        ]


SHOWN = frozenset(
    [
        "beta",
        "loss_type",
        "label_smoothing",
        "ref_update",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
        "max_length",
        "learning_rate",
        "max_grad_norm",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_steps",
        "num_train_epochs",
        "seed",
    ]
)


class _Steps(TrainerCallback):
    """What an optimiser step needs before and after it."""

    def __init__(self, trainer: TRDPOTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._batches.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.ref_update != "none" and state.global_step % args.ref_model_sync_steps == 0:
            self._trainer.check_weights()
            self._trainer.reference.update(args.alpha, state.global_step)


@contextlib.contextmanager
def _reading(checkpoint: str | None, what: str) -> Iterator[None]:
    """Name what was sound on its own but not as a part of this run."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"checkpoint {checkpoint!r} cannot be resumed from: {what} cannot be loaded: {error}"
        ) from error


def _finite(tensors: Sequence[Tensor]) -> bool:
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def check_attention(implementation: str | None, device: torch.device) -> None:
    """Raise `InputError` for an `attn_implementation` that cannot be trained with on a device."""
    if implementation == "flex_attention" and device.type == "cpu":
        raise InputError(
            "attn_implementation 'flex_attention' needs a GPU: torch has no backward pass for it on the CPU; use sdpa"
        )


def _disable_dropout(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _with_adapter(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise InputError("peft_config must not be given for a model that carries an adapter already")
    kind = getattr(peft_config, "peft_type", None)
    if kind != "LORA":
        raise InputError(f"peft_config must be a LoraConfig, got {getattr(kind, 'value', type(peft_config).__name__)}")
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise InputError(f"peft_config does not fit this model: {error}") from error
