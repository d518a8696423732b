"""What `essa trdpo` does once its options are read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback

from essa.checkpoint import (
    COMMAND_FILE,
    RESULTS,
    SaveError,
    alone_in,
    check_resumed_folder,
    make_folder,
    read_command,
    refuse_existing,
    write_atomically,
    write_folder,
)
from essa.config import InputError
from essa.data import DataSettings, absolute
from essa.models import load_adapter, load_base, lora_config
from essa.recorded import resume_command
from essa.trdpo.checkpoints import parts_of_checkpoints, whole_checkpoints
from essa.trdpo.config import TRDPOConfig
from essa.trdpo.settings import NEW_ADAPTER, CommandSettings
from essa.trdpo.trainer import TRDPOTrainer, check_attention

NOT_TRAINING_ARGUMENTS = (*NEW_ADAPTER, "dtype", "quantization", "attn_implementation", "device")

MAY_CHANGE = (
    "output_dir",
    "max_steps",
    "num_train_epochs",
    "save_total_limit",
    "report",
    "report_to",
    "run_name",
    "device",
)
"""Options that a resumed run may have other values of."""


def run_trdpo(
    settings: CommandSettings,
    *,
    model_name_or_path: str,
    adapter: str | None,
    dataset_name: str,
    data: DataSettings,
    resume_from_checkpoint: str | None,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> TRDPOTrainer:
    """Train, save the policy as output_dir/adapter or output_dir/model, and write the report.

    Args:
        settings: the checked options.
        data: which rows of the data set to train and to evaluate on.
        resume_from_checkpoint: output_dir again, to continue from the last sound checkpoint there.
        say: prints a line.

    A run that was ended before its first checkpoint starts over.

    Raises:
        InputError: an option, a row or a checkpoint cannot be used.
        SaveError: the disk is full, for instance. The message says how to go on.
    """
    settings = _with_lora_defaults(settings, adapter)
    folder = Path(settings.output_dir)
    command = {
        "model_name_or_path": absolute(model_name_or_path),
        "adapter": absolute(adapter),
        "dataset_name": absolute(dataset_name),
        "trust_remote_code": trust_remote_code,
        **data.recorded(),
        **dataclasses.asdict(settings),
    }
    if resume_from_checkpoint is not None:
        check_resumed_folder(resume_from_checkpoint, folder)
        _refuse_changes(folder, command)
    starts_over = _never_saved(folder)
    if resume_from_checkpoint is None and not starts_over:
        refuse_existing(folder, COMMAND_FILE)
    resumes = resume_from_checkpoint is not None and not starts_over
    if resumes and not whole_checkpoints(folder):
        raise InputError(f"no checkpoint to resume in {str(folder)!r}; its run was to save one every save_steps steps")
    args = _training_arguments(settings, evaluate=data.evaluates)
    check_attention(settings.attn_implementation, args.device)
    train, evaluation = data.read(dataset_name, settings.seed)
    model: Any
    model, tokenizer = load_base(
        model_name_or_path,
        dtype=settings.dtype,
        quantization=settings.quantization,
        device=settings.device,
        trust_remote_code=trust_remote_code,
        attn_implementation=settings.attn_implementation,
    )
    new_adapter = None
    if adapter is not None:
        model = load_adapter(model, adapter)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    elif settings.lora_r:
        new_adapter = lora_config(model, *(getattr(settings, name) for name in NEW_ADAPTER))
    trainer = TRDPOTrainer(
        model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=new_adapter,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Lines(say))
    kind = "model" if settings.lora_r == 0 else "adapter"
    make_folder(folder)
    with alone_in(folder) if args.should_save else contextlib.nullcontext():
        try:
            if args.should_save:
                _refuse_since_written(folder, resumes=resumes, starts_over=starts_over)
                if starts_over:
                    say(f"{folder} holds a run that was ended before its first checkpoint: it starts over")
                    _remove_parts(folder)
                write_atomically(folder / COMMAND_FILE, json.dumps(command, indent=2) + "\n")
            trainer.accelerator.wait_for_everyone()
            trainer.train(resume_from_checkpoint=resumes)
            if args.should_save:
                write_folder(folder / kind, lambda fresh: trainer.save_model(str(fresh)))
        except KeyboardInterrupt:
            say(_how_to_go_on(trainer, command))
            raise
        except SaveError as error:
            raise SaveError(f"{error}\n{_how_to_go_on(trainer, command)}") from error
        except (OSError, SafetensorError) as error:
            raise SaveError(f"the run cannot be written: {error}\n{_how_to_go_on(trainer, command)}") from error
    if evaluation is not None:
        metrics = trainer.evaluate()
        say(f"evaluation: loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_rewards/accuracies']:.3f}")
    say(f"{kind + ':':<9}{folder / kind}")
    if settings.report:
        say(f"report:  {folder / 'report.html'}")
    return trainer


def _with_lora_defaults(settings: CommandSettings, adapter: str | None) -> CommandSettings:
    """The options of a new adapter in full, if there is to be one; otherwise none of them may be given."""
    given = {name: value for name in NEW_ADAPTER if (value := getattr(settings, name)) is not None}
    if adapter is None and settings.lora_r != 0:
        return dataclasses.replace(settings, **{**NEW_ADAPTER, **given})
    instead = "adapter" if adapter is not None else "lora_r 0, which trains the whole model"
    for name, value in given.items():
        if adapter is not None or name != "lora_r":
            raise InputError(f"{name} is of a new adapter and must not be given with {instead}, got {value!r}")
    return settings


def _training_arguments(settings: CommandSettings, *, evaluate: bool) -> TRDPOConfig:
    own = {name: value for name, value in dataclasses.asdict(settings).items() if name not in NOT_TRAINING_ARGUMENTS}
    eval_steps, save_steps = own.pop("eval_steps"), own.pop("save_steps")
    if evaluate and eval_steps:
        own |= {"eval_strategy": "steps", "eval_steps": eval_steps}
    own |= {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {"save_strategy": "no"}
    try:
        return TRDPOConfig(**own, disable_tqdm=True, use_cpu=settings.device == "cpu")
    except InputError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(str(error)) from error


def _refuse_changes(folder: Path, command: dict[str, Any]) -> None:
    """A run goes on with the options it was started with: its checkpoint's optimiser and schedule are of those."""
    recorded = read_command(folder)
    changed = [
        f"{name} was {recorded[name]!r}, now {value!r}"
        for name, value in command.items()
        if name in recorded and recorded[name] != value and name not in MAY_CHANGE
    ]
    if changed:
        raise InputError(f"the run in {str(folder)!r} cannot be resumed with other options: " + "; ".join(changed))


def _never_saved(folder: Path) -> bool:
    """Whether a folder's run was ended before its first checkpoint, and without a result."""
    results = [name for name in RESULTS if name != COMMAND_FILE and (folder / name).exists()]
    return (folder / COMMAND_FILE).is_file() and not results and not whole_checkpoints(folder)


def _refuse_since_written(folder: Path, *, resumes: bool, starts_over: bool) -> None:
    """Raise `InputError` if another process trained in a folder while this one, without its lock, loaded the model."""
    if not resumes and (not starts_over or not _never_saved(folder)):
        refuse_existing(folder, COMMAND_FILE)


def _remove_parts(folder: Path) -> None:
    """Take away checkpoints that were not written to the end: a trainer that deletes old ones would count them."""
    for checkpoint in parts_of_checkpoints(folder):
        shutil.rmtree(checkpoint)


def _how_to_go_on(trainer: TRDPOTrainer, command: dict[str, Any]) -> str:
    stopped, folder = f"Stopped after step {trainer.state.global_step}", command["output_dir"]
    if whole_checkpoints(folder):
        return f"{stopped}; resume with `{resume_command('trdpo', folder, command)}`"
    return f"{stopped}, before the first checkpoint (save_steps {command['save_steps']}): start it anew"


class _Lines(TrainerCallback):
    """A line for every log."""

    SHOWN = (
        ("loss", "loss {:.4f}"),
        ("rewards/accuracies", "accuracy {:.3f}"),
        ("rewards/margins", "margin {:+.4f}"),
        ("kl/policy_reference", "KL to reference {:.2e}"),
        ("kl/policy_initial", "KL to start {:.2e}"),
        ("eval_loss", "evaluation: loss {:.4f}"),
        ("eval_rewards/accuracies", "accuracy {:.3f}"),
    )

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._updates = say, 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        parts = [text.format(logs[name]) for name, text in self.SHOWN if name in logs]
        if parts and state.is_world_process_zero:
            if logs.get("reference/updates", 0) > self._updates:
                self._updates = logs["reference/updates"]
                parts.append(f"reference moved at step {logs['reference/last_update']}")
            self._say(f"step {state.global_step}/{state.max_steps}: " + "  ".join(parts))
