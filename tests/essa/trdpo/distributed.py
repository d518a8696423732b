"""Run by `torchrun`: one rank of a small training, whose weights rank 0 saves. Arguments: the folder, and the loss type."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from essa.demo.warm_start import BASE_MODEL
from essa.models import load_tokenizer
from essa.trdpo import TRDPOConfig, TRDPOTrainer
from peft import LoraConfig
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from conftest import make_judged, make_model, make_pairs


def main(folder: str, loss_type: str) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = make_model()
    rows = make_pairs(32)
    if loss_type == "kto":
        # The one completion of all is also every row's mismatched one, whatever rows share a process.
        rows = [{**row, "completion": "12+3", "label": number % 4 != 0} for number, row in enumerate(make_judged(32))]
    args = TRDPOConfig(
        folder, loss_type=loss_type, use_cpu=True, max_steps=6, learning_rate=5e-3, beta=0.2, report=False,
        logging_steps=1, ref_model_sync_steps=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    args.per_device_train_batch_size = 8 // args.world_size
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    tokenizer = load_tokenizer(str(BASE_MODEL))
    trainer = TRDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    trainer.train()
    assert trainer.reference.updates == 3
    path = Path(folder, f"rank{args.process_index}of{args.world_size}.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    kl = [record.get("kl/mismatched", 0.0) for record in trainer.state.log_history if "loss" in record]
    save_file({**weights, "losses": torch.tensor(losses), "kl": torch.tensor(kl)}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
