"""A moving reference for TRL's own `DPOTrainer` and `KTOTrainer`, with PEFT too.

TRL takes a PEFT model's reference from an adapter named "ref" where there is one, and from the bare base model where
there is none. The callback keeps that adapter, and moves it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from essa.checkpoint import write_atomically
from essa.config import InputError
from essa.trdpo.reference import FORMAT, STATE_FILE, WEIGHTS_FILE, check_trainable, mix_, read_saved
from essa.trdpo.settings import REF_UPDATES

ADAPTER = "ref"


class MovingReferenceCallback(TrainerCallback):
    """reference <- alpha x policy + (1 - alpha) x reference, every so many optimiser steps.

        DPOTrainer(..., peft_config=LoraConfig(...), callbacks=[MovingReferenceCallback(alpha=0.6, sync_steps=512)])

    With full fine-tuning the trainer's reference model is handed over once the trainer is there:

        trainer.add_callback(MovingReferenceCallback(ref_model=trainer.ref_model))

    Leave TRL's `sync_ref_model` off. The reference is kept in float32, mixed in float64, and saved with every
    checkpoint; a resumed run takes it from there.

    Args:
        alpha: weight of the policy in an update, in [0, 1]. The paper's default is 0.6.
        sync_steps: optimiser steps between updates. The paper's default is 512.
        update: "soft", or "hard": alpha is 1.
        ref_model: the trainer's reference model, without PEFT.

    Attributes:
        last_update: the optimiser step of the last update.

    Raises:
        InputError: an argument is not as above.
    """

    def __init__(
        self, alpha: float = 0.6, sync_steps: int = 512, update: str = "soft", ref_model: nn.Module | None = None
    ) -> None:
        if update not in REF_UPDATES[:2]:
            raise InputError(f"update must be one of {', '.join(REF_UPDATES[:2])}, got {update!r}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise InputError(f"alpha must be a number in [0, 1], got {alpha!r}")
        if isinstance(sync_steps, bool) or not isinstance(sync_steps, int) or sync_steps < 1:
            raise InputError(f"sync_steps must be a whole number of at least 1, got {sync_steps!r}")
        self.alpha, self.sync_steps = (1.0 if update == "hard" else float(alpha)), sync_steps
        self.last_update = 0
        self._ref_model = ref_model
        self._exact: dict[str, Tensor] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The trainer is being made: give a PEFT model its reference adapter before TRL looks for one."""
        if self._ref_model is None:
            _add_adapter(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the reference over, from the checkpoint where the run is resumed."""
        if getattr(args, "sync_ref_model", False):
            raise InputError("sync_ref_model must be off: MovingReferenceCallback moves the reference")
        if getattr(args, "precompute_ref_log_probs", False):
            raise InputError("precompute_ref_log_probs must be off where the reference moves")
        if self._ref_model is None:
            _add_adapter(model)
        self._exact = {name: p.detach().to(torch.float32, copy=True) for name, p in self._references(model).items()}
        if state.global_step:
            self._resume(Path(args.output_dir, f"checkpoint-{state.global_step}"))
            self._lend(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move the reference, when it is time."""
        if state.global_step % self.sync_steps:
            return
        policy = self._policy(model)
        for name, exact in self._exact.items():
            mix_(exact, policy[name], self.alpha)
        self._lend(model)
        self.last_update = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the reference into the checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            save_file({name: tensor.cpu() for name, tensor in self._exact.items()}, folder / WEIGHTS_FILE)
            write_atomically(
                folder / STATE_FILE, json.dumps({"format": FORMAT, "last_update": self.last_update}, indent=2) + "\n"
            )

    def _resume(self, folder: Path) -> None:
        weights, state = read_saved(folder)
        if {n: t.shape for n, t in weights.items()} != {n: t.shape for n, t in self._exact.items()}:
            raise InputError(f"the reference in {str(folder)!r} is of another model")
        for name, exact in self._exact.items():
            exact.copy_(weights[name])
        self.last_update = state["last_update"]

    def _references(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights TRL's reference forward passes use, by the names of the policy's."""
        if self._ref_model is not None:
            return dict(_unwrapped(self._ref_model).named_parameters())
        model = _unwrapped(model)
        return {name: model.get_parameter(name.replace(".default.", f".{ADAPTER}.")) for name in self._policy(model)}

    def _policy(self, model: nn.Module) -> dict[str, nn.Parameter]:
        parameters = dict(_unwrapped(model).named_parameters())
        if self._ref_model is not None:
            return parameters
        return {name: parameter for name, parameter in parameters.items() if ".default." in name}

    @torch.no_grad()
    def _lend(self, model: nn.Module) -> None:
        for name, reference in self._references(model).items():
            reference.copy_(self._exact[name])


def _unwrapped(model: nn.Module) -> Any:
    return model.module if hasattr(model, "module") and not isinstance(model, PeftModel) else model


def _add_adapter(model: nn.Module) -> None:
    """A frozen copy of the adapter "default", if there is none yet."""
    model = _unwrapped(model)
    if not isinstance(model, PeftModel):
        raise InputError("without PEFT, MovingReferenceCallback needs ref_model=trainer.ref_model")
    check_trainable(model)
    if model.active_adapters != ["default"]:
        raise InputError(f"the policy's adapter must be named 'default', as TRL has it, got {model.active_adapters!r}")
    if ADAPTER in model.peft_config:
        return
    model.add_adapter(ADAPTER, model.peft_config["default"])
    for name, parameter in list(model.named_parameters()):
        if ".default." in name:
            copy = model.get_parameter(name.replace(".default.", f".{ADAPTER}."))
            copy.data = parameter.detach().clone()
            copy.requires_grad_(False)
