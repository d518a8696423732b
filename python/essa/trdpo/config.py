"""`TRDPOConfig`: transformers' training arguments and the settings of preference alignment in one class."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from essa.trdpo.settings import MethodSettings


@dataclass
class TRDPOConfig(MethodSettings, TrainingArguments):
    """Settings of `TRDPOTrainer`. A wrong value raises `InputError` here, before any model is loaded.

    Every field of `transformers.TrainingArguments` is accepted; those below differ in their defaults. The method's own
    carry the names and meanings of TRL's `DPOConfig` and are explained in their `metadata["help"]`; their defaults are
    the paper's.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Step size of AdamW."})
    max_grad_norm: float = field(default=2.0, metadata={"help": "Gradients are clipped to this norm."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no effect: rows are read in full."})

    def __post_init__(self) -> None:
        self.check()
        super().__post_init__()
