"""`essa demo --trdpo`: what a moving reference buys, and where it does harm, on a task whose true reward is known.

A small policy writes six digits, held to digits as a grammar would, after a prompt. The gold reward of an answer is the sum of a random table's entries for
each of its digits, given the prompt's first, and for each of its neighbouring pairs. Nobody shows it to the training:
that sees few pairs of the policy's own answers, and which of the two was preferred, with the noise of a Bradley-Terry
judge. So a policy can be driven past what the pairs say, and gold reward falls while the loss goes on falling.

Every method runs over a sweep of beta, for three seeds. Each policy is measured by its gold reward, by how often its
answer beats the start's, and by its KL divergence from the start. All of them are shown, not the best one.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

from essa import report
from essa.checkpoint import write_atomically
from essa.config import InputError
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL
from essa.models import load_tokenizer
from essa.report import COLOURS, Table
from essa.trdpo.config import TRDPOConfig
from essa.trdpo.data import Preferences, read_preferences
from essa.trdpo.trainer import TRDPOTrainer

DIGITS = "0123456789"
PROMPT_DIGITS, ANSWER_DIGITS = 2, 6
PAIRS, BATCH, STEPS, SYNC_STEPS, LEARNING_RATE = 192, 32, 64, 8, 2e-3
SAMPLES, JUDGE_NOISE = 512, 3.0
TABLES_SEED = 20240415
BETAS = (0.1, 0.3, 1.0, 2.0)
SEEDS = (0, 1, 2)
METHODS: dict[str, dict[str, Any]] = {
    "DPO": {"ref_update": "none"},
    "TR-DPO, soft": {"ref_update": "soft", "ref_model_mixup_alpha": 0.6},
    "TR-DPO, hard": {"ref_update": "hard"},
}
WIDTH = 26
TITLE = "Fixed and moving reference: gold reward against KL, over a sweep of beta"
ADVICE = (
    "Read it at equal beta and at equal KL. At equal beta a moving reference goes further from the start. Where beta is "
    "high (1 and 2) DPO hardly moves, and going further pays in gold reward and win rate. Where beta is low (0.1) DPO "
    "goes far enough: the moving reference spends more KL for no more, or less, gold reward, because it goes on fitting "
    "scarce and noisy pairs. At equal KL the curves lie close together: much of what a moving reference gives, DPO with a "
    "lower beta gives too. So use it where beta is high or given, with a held-out win rate to stop by; where beta can be "
    "swept, sweep it for plain DPO first (ref_update none)."
)


@dataclass(frozen=True)
class Outcome:
    """A trained policy, measured on fresh prompts."""

    method: str
    beta: float
    seed: int
    gold: float
    win_rate: float
    kl: float


class Task:
    """Prompts, the gold reward and the start of every policy."""

    def __init__(self, seed: int) -> None:
        self.tokenizer: Any = load_tokenizer(str(BASE_MODEL))
        self.digits = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(DIGITS)))
        self._place = torch.zeros(len(self.tokenizer), dtype=torch.long)
        self._place[self.digits] = torch.arange(10)
        tables = torch.Generator().manual_seed(TABLES_SEED)
        self._unigram = torch.randn(10, 10, generator=tables)
        self._bigram = torch.randn(10, 10, generator=tables)
        self.generator = torch.Generator().manual_seed(seed)
        self.start = self._make_start(seed)

    def _make_start(self, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                pad_token_id=self.tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        end = torch.full((64, 1), self.tokenizer.eos_token_id)
        for _ in range(60):
            ids = torch.cat((self.prompts(64), self._random_digits(64, ANSWER_DIGITS), end), 1)
            labels = ids.clone()
            labels[:, : PROMPT_DIGITS + 1] = -100
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return model.eval()

    def _random_digits(self, rows: int, count: int) -> Tensor:
        return self.digits[torch.randint(10, (rows, count), generator=self.generator)]

    def prompts(self, rows: int) -> Tensor:
        """Token ids [rows, 3]: a mark and two digits."""
        mark = torch.full((rows, 1), self.tokenizer.convert_tokens_to_ids(task.FREE_CHOICE))
        return torch.cat((mark, self._random_digits(rows, PROMPT_DIGITS)), 1)

    def gold(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """The gold reward [rows] of answers [rows, 6]."""
        first, answer = self._place[prompts[:, 1]], self._place[answers]
        pairs = self._bigram[answer[:, :-1], answer[:, 1:]]
        return self._unigram[first[:, None], answer].sum(1) + pairs.sum(1)

    @torch.no_grad()
    def sample(self, model: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Six digits for every prompt, drawn from the model held to digits, and their log-probabilities [rows]."""
        ids, logps = prompts, torch.zeros(len(prompts))
        for _ in range(ANSWER_DIGITS):
            distribution = model(input_ids=ids, use_cache=False).logits[:, -1, self.digits].log_softmax(-1)
            digit = torch.multinomial(distribution.exp(), 1, generator=self.generator)
            logps += distribution.gather(1, digit)[:, 0]
            ids = torch.cat((ids, self.digits[digit]), 1)
        return ids[:, prompts.shape[1] :], logps

    @torch.no_grad()
    def logps(self, model: Any, prompts: Tensor, answers: Tensor) -> Tensor:
        """Log-probabilities [rows] of answers from the model held to digits."""
        logits = model(input_ids=torch.cat((prompts, answers), 1), use_cache=False).logits
        distribution = logits[:, prompts.shape[1] - 1 : -1, self.digits].log_softmax(-1)
        return distribution.gather(2, self._place[answers][..., None])[..., 0].sum(1)

    def pairs(self) -> Preferences:
        """Pairs of the start's answers, judged with the noise of a Bradley-Terry model of the gold reward."""
        prompts = self.prompts(PAIRS)
        one, other = (self.sample(self.start, prompts)[0] for _ in range(2))
        difference = self.gold(prompts, one) - self.gold(prompts, other)
        first = torch.rand(PAIRS, generator=self.generator) < torch.sigmoid(difference / JUDGE_NOISE)
        rows = []
        for prompt, a, b, keep in zip(prompts, one, other, first.tolist(), strict=True):
            texts = [self.tokenizer.decode(ids) for ids in ((a, b) if keep else (b, a))]
            rows.append({"prompt": self.tokenizer.decode(prompt), "chosen": texts[0], "rejected": texts[1]})
        return read_preferences(rows, self.tokenizer, name="pairs", kto=False, max_length=None)

    def measure(self, model: Any) -> tuple[float, float, float]:
        """Gold reward, win rate against the start, and KL divergence from it in nats an answer."""
        prompts = self.prompts(SAMPLES)
        answers, logps = self.sample(model, prompts)
        gold = self.gold(prompts, answers)
        rival = self.gold(prompts, self.sample(self.start, prompts)[0])
        wins = (gold > rival).float() + 0.5 * (gold == rival)
        kl = logps - self.logps(self.start, prompts, answers)
        return gold.mean().item(), wins.mean().item(), kl.mean().item()


def train(task: Task, pairs: Preferences, beta: float, seed: int, method: dict[str, Any], folder: str) -> Any:
    """The policy after training."""
    args = TRDPOConfig(
        folder,
        beta=beta,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        ref_model_sync_steps=SYNC_STEPS,
        # The rows are too short to gain from it.
        prompt_sharing=False,
        padding_free=False,
        seed=seed,
        logging_steps=STEPS,
        save_strategy="no",
        report=False,
        disable_tqdm=True,
        use_cpu=True,
        **method,
    )
    model = copy.deepcopy(task.start)
    trainer = TRDPOTrainer(model, args=args, train_dataset=pairs, processing_class=task.tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def run_trdpo_demo(
    output_dir: str | Path,
    say: Callable[[str], None] = print,
    *,
    betas: tuple[float, ...] = BETAS,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, Any]:
    """Train every method at every beta with every seed, and write the table and the picture.

    Args:
        output_dir: a folder that is not there yet, or empty.
        say: prints a line.
        betas, seeds: the sweep.

    Returns:
        What `output_dir/summary.json` holds.

    Raises:
        InputError: output_dir cannot be used.
    """
    folder = Path(output_dir).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output_dir {str(output_dir)!r} is there already and not empty; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    outcomes, starts = [], []
    for seed in seeds:
        task = Task(seed)
        pairs = task.pairs()
        starts.append(task.measure(task.start)[0])
        for beta in betas:
            for name, method in METHODS.items():
                with tempfile.TemporaryDirectory() as scratch:
                    policy = train(task, pairs, beta, seed, method, scratch)
                outcomes.append(Outcome(name, beta, seed, *task.measure(policy)))
        say(f"seed {seed}: {len(betas) * len(METHODS)} policies trained, {time.perf_counter() - started:.0f} s")
    start = statistics.mean(starts)
    rows = table(outcomes, betas)
    say(f"\nGold reward of the start: {start:.2f}. Means over {len(seeds)} seeds, +- their standard deviation:")
    for line in rows:
        say("  " + line)
    say("\n" + ADVICE)
    png, svg = report.picture(lambda figure: draw(figure, outcomes, start), TITLE, (9, 4.4))
    (folder / "frontier.png").write_bytes(png)
    content = [(line[:WIDTH].strip(), line[WIDTH:].strip()) for line in rows[1:]]
    numbers = [("policies", str(len(outcomes))), ("gold reward of the start", f"{start:.2f}")]
    page = report.page(TITLE, ADVICE, numbers, svg, [Table("Means over the seeds", content)], "frontier")
    write_atomically(folder / "report.html", page)
    summary = {
        "start_gold": start,
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "seconds": time.perf_counter() - started,
        "picture": str(folder / "frontier.png"),
        "report": str(folder / "report.html"),
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    say(f"picture: {summary['picture']}\nreport:  {summary['report']}")
    return summary


def table(outcomes: list[Outcome], betas: tuple[float, ...]) -> list[str]:
    """A line for every method and beta."""
    lines = [f"{'':<{WIDTH}}{'gold reward':>15}{'win rate':>17}{'KL from start':>17}"]
    for beta in betas:
        for name in METHODS:
            own = [outcome for outcome in outcomes if (outcome.method, outcome.beta) == (name, beta)]
            columns = [[getattr(outcome, field) for outcome in own] for field in ("gold", "win_rate", "kl")]
            shown = [
                f"{statistics.mean(column):.{digits}f} +- {statistics.pstdev(column):.{digits}f}"
                for column, digits in zip(columns, (2, 3, 1), strict=True)
            ]
            lines.append(f"beta {beta:<5g}{name:<{WIDTH - 10}}{shown[0]:>15}{shown[1]:>17}{shown[2]:>17}")
    return lines


def draw(figure: Any, outcomes: list[Outcome], start: float) -> None:
    """Gold reward and win rate over KL: every policy as a dot, and each method's means over the seeds joined up."""
    panels = (("gold", "gold reward", start), ("win_rate", "win rate against the start", 0.5))
    for axes, (field, label, level) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.axhline(level, color=COLOURS[-1], linewidth=0.8, linestyle="--")
        for colour, name in zip(COLOURS, METHODS, strict=False):
            own = [outcome for outcome in outcomes if outcome.method == name]
            axes.scatter([o.kl for o in own], [getattr(o, field) for o in own], s=9, alpha=0.35, color=colour)
            means = []
            for beta in sorted({o.beta for o in own}):
                at = [o for o in own if o.beta == beta]
                means.append((statistics.mean(o.kl for o in at), statistics.mean(getattr(o, field) for o in at)))
                if name == "DPO":
                    axes.annotate(f"{beta:g}", means[-1], textcoords="offset points", xytext=(3, -10), fontsize=7)
            axes.plot(*zip(*means, strict=True), color=colour, marker="o", markersize=4, linewidth=1.5, label=name)
        axes.set_xlabel("KL from the start, nats an answer")
        axes.set_ylabel(label)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
