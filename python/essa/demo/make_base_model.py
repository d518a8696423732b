"""Makes `base_model/`: a 0.3 M parameter Qwen2 that knows four ways to answer an addition problem.

    python -m essa.demo.make_base_model [output_dir]

Half of the rows say which behaviour to show, so every behaviour is learnt; the unmarked half mixes them, so an unmarked
prompt gets the wrong one most of the time. Only training problems are shown. Deterministic on one thread; about four
minutes on one core.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from essa.demo import task

STEPS, BATCH, LEARNING_RATE, WARMUP = 1400, 256, 3e-3, 100


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, as an ordinary `tokenizer.json`."""
    vocabulary = {token: index for index, token in enumerate(task.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=task.UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=task.PAD,
        eos_token=task.EOS,
        unk_token=task.UNKNOWN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=32,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(task.VOCABULARY),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids [rows, 11] and labels that cover the answer and the end token. Every row has the same length."""
    input_ids = tokenizer([prompt + answer + task.EOS for prompt, answer in pairs], return_tensors="pt").input_ids
    labels = input_ids.clone()
    labels[:, : task.PROMPT_LENGTH] = -100
    return input_ids, labels


def pretrain(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    problems = task.split("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(STEPS):
        warmup, cosine = (step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(warmup, cosine)
        pairs = task.demonstrations(problems, BATCH, task.PRETRAINING_MIXTURE, rng, tagged=0.5)
        input_ids, labels = encode(tokenizer, pairs)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{STEPS} loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, mark: str, behaviour: str) -> float:
    """Exact match of greedy answers on the validation problems."""
    problems = task.split("validation")
    batch = tokenizer([task.prompt(problem, mark) for problem in problems], return_tensors="pt")
    output = model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        max_new_tokens=task.ANSWER_LENGTH + 1,
        do_sample=False,
    )
    texts = tokenizer.batch_decode(output[:, task.PROMPT_LENGTH :], skip_special_tokens=True)
    return sum(t == task.answer(p, behaviour) for t, p in zip(texts, problems, strict=True)) / len(problems)


def main(output_dir: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model.train(), tokenizer, random.Random(0))
    model.eval()
    for mark in task.BEHAVIOURS:
        print(f"marked {mark!r}: {accuracy(model, tokenizer, mark, mark):.3f}")
    for behaviour in task.BEHAVIOURS:
        print(f"unmarked, share of {behaviour!r}: {accuracy(model, tokenizer, task.FREE_CHOICE, behaviour):.3f}")
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    # The class name that transformers 4 and 5 both know.
    settings = json.loads((output_dir / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (output_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "base_model")
