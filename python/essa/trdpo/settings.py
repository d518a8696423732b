"""The settings of preference alignment, without transformers: the command line reads its options off them."""

from __future__ import annotations

from dataclasses import dataclass

from essa.config import REPORT_TO, Checks, InputError, setting

LOSS_TYPES = ("sigmoid", "ipo", "kto")
REF_UPDATES = ("soft", "hard", "none")
NEW_ADAPTER = {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear"}
"""Options of a new adapter, and their defaults."""


@dataclass
class MethodSettings(Checks):
    """What TR-DPO adds to a training run, under TRL's names where TRL has them."""

    beta: float = setting(0.05, "How strongly the policy is held to the reference; IPO's tau.")
    loss_type: str = setting("sigmoid", "sigmoid (DPO), ipo, or kto (rows are judged one by one, not in pairs).")
    label_smoothing: float = setting(
        0.0, "sigmoid: the probability that a preference is the wrong way round, in [0, 0.5)."
    )
    desirable_weight: float = setting(1.0, "kto: weight of the loss of rows whose label is true.")
    undesirable_weight: float = setting(1.0, "kto: weight of the loss of rows whose label is false.")
    sync_ref_model: bool = setting(True, "Move the reference. Off: plain DPO, IPO or KTO.")
    ref_update: str = setting(
        "soft",
        "soft: reference <- alpha x policy + (1 - alpha) x reference. hard: reference <- policy. none: it never moves.",
    )
    ref_model_mixup_alpha: float = setting(0.6, "Weight of the policy in a soft update, in [0, 1].")
    ref_model_sync_steps: int = setting(512, "Optimiser steps between two updates of the reference (the paper's tau).")
    max_length: int | None = setting(
        1024, "Most tokens of prompt and completion. Longer completions are cut, longer prompts refused."
    )
    precompute_ref_log_probs: bool = setting(
        False, "Compute the log-probabilities of a reference that never moves once, before training."
    )
    prompt_sharing: bool = setting(
        True, "Compute each prompt once for both of its completions, where the model's attention allows it."
    )
    padding_free: bool = setting(
        True,
        "Without prompt_sharing too, lay a batch's sequences out in one row without padding, where the model's attention "
        "allows it. Prompt sharing never pads.",
    )
    report: bool = setting(True, "Write report.html and report.png into output_dir after training.")

    def check(self) -> None:
        """Raise `InputError` for a value that cannot be used; bring sync_ref_model and ref_update in line."""
        self._check_float("beta", above=0.0)
        self._check_choice("loss_type", LOSS_TYPES)
        self._check_float("label_smoothing", at_least=0.0, at_most=0.5)
        if self.label_smoothing == 0.5 or (self.label_smoothing and self.loss_type != "sigmoid"):
            raise InputError(
                f"label_smoothing must be below 0.5, and 0 unless loss_type is sigmoid, got {self.label_smoothing!r} "
                f"with {self.loss_type}"
            )
        for name in ("desirable_weight", "undesirable_weight"):
            self._check_float(name, at_least=0.0)
        self._check_choice("ref_update", REF_UPDATES)
        self._check_float("ref_model_mixup_alpha", at_least=0.0, at_most=1.0)
        self._check_int("ref_model_sync_steps", 1)
        if self.max_length is not None:
            self._check_int("max_length", 2)
        for name in ("sync_ref_model", "precompute_ref_log_probs", "prompt_sharing", "padding_free", "report"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not self.sync_ref_model:
            self.ref_update = "none"
        self.sync_ref_model = self.ref_update != "none"
        if self.precompute_ref_log_probs and self.sync_ref_model:
            raise InputError(
                "precompute_ref_log_probs must be false where the reference moves (ref_update "
                f"{self.ref_update!r}): its log-probabilities would be those of the start"
            )
        if self.precompute_ref_log_probs and self.loss_type == "kto":
            raise InputError("precompute_ref_log_probs must be false with loss_type kto: its KL term pairs rows anew")

    @property
    def alpha(self) -> float:
        """Weight of the policy in an update of the reference."""
        return {"soft": self.ref_model_mixup_alpha, "hard": 1.0, "none": 0.0}[self.ref_update]


@dataclass
class CommandSettings(MethodSettings):
    """The options of `essa trdpo`: the method's, the adapter's, and the training arguments one reaches for most."""

    output_dir: str = setting("trdpo-output", "Folder of the run: adapter or model, checkpoints, report.")
    lora_r: int | None = setting(None, "Rank of the new LoRA adapter. 0: full fine-tuning. Default: 16.")
    lora_alpha: int | None = setting(None, "LoRA scaling: the adapter counts lora_alpha / lora_r. Default: 32.")
    lora_target_modules: str | None = setting(
        None,
        "Modules to adapt: names separated by commas, or all-linear for every linear layer but the head, the default.",
    )
    dtype: str = setting("auto", "auto (as saved), float32, bfloat16 or float16.")
    quantization: str = setting(
        "none", "Quantise the base's linear layers under the adapter: int8, int4 (computes in bfloat16) or none."
    )
    attn_implementation: str | None = setting(
        None, "Attention, by transformers' names: sdpa, flex_attention (on a GPU), ... Default: transformers' choice."
    )
    device: str = setting("auto", "auto (a GPU if there is one) or cpu.")
    learning_rate: float = setting(1e-6, "Step size of AdamW. LoRA adapters usually want 10 to 100 times the default.")
    lr_scheduler_type: str = setting("linear", "Schedule of the learning rate, by transformers' names.")
    warmup_steps: float = setting(0, "Steps of linear warm-up; below 1, the fraction of all steps.")
    max_grad_norm: float = setting(2.0, "Gradients are clipped to this norm.")
    weight_decay: float = setting(0.0, "Weight decay of AdamW.")
    num_train_epochs: float = setting(1.0, "Passes over the data.")
    max_steps: int = setting(-1, "Optimiser steps; above 0 it overrides num_train_epochs.")
    per_device_train_batch_size: int = setting(8, "Rows per device and forward pass.")
    per_device_eval_batch_size: int = setting(8, "Rows per device and forward pass in evaluation.")
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimiser step.")
    gradient_checkpointing: bool = setting(False, "Trade compute for memory.")
    bf16: bool = setting(False, "Compute in bfloat16 autocast.")
    logging_steps: float = setting(10, "Log every so many steps.")
    eval_steps: int = setting(0, "Evaluate every so many steps. 0: only after training.")
    save_steps: int = setting(500, "Checkpoint every so many steps. 0: none.")
    save_total_limit: int | None = setting(None, "Keep at most this many checkpoints.")
    report_to: str = setting("none", REPORT_TO)
    run_name: str | None = setting(None, "Name of the run in wandb and in the report.")
    seed: int = setting(42, "Seed of the adapter's initial weights and of the order of rows.")

    def check(self) -> None:
        """Raise `InputError` for an option that cannot be used."""
        super().check()
        self._check_path("output_dir")
        for name, least in (("lora_r", 0), ("lora_alpha", 1)):
            if getattr(self, name) is not None:
                self._check_int(name, least)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            self._check_int(name, 1)
        if self.lora_target_modules is not None and not self.lora_target_modules:
            raise InputError(f"lora_target_modules must be text, got {self.lora_target_modules!r}")
        self._check_choice("device", ("auto", "cpu"))
        self._check_reporters()
        self._check_float("learning_rate", above=0.0)
        for name in ("num_train_epochs", "logging_steps"):
            self._check_float(name, above=0.0)
        for name in ("warmup_steps", "max_grad_norm", "weight_decay"):
            self._check_float(name, at_least=0.0)
        if self.max_steps != -1:
            self._check_int("max_steps", 1)
        self._check_int("per_device_eval_batch_size", 1)
        self._check_int("seed", 0)
        for name in ("eval_steps", "save_steps"):
            self._check_int(name, 0)
        if self.quantization != "none" and self.lora_r == 0:
            raise InputError("quantization must be none with lora_r 0: the whole model cannot be trained quantised")
