"""ESSA on quantised bases: memory, tokens/s, and whether the gain survives.

    python -m benchmarks.quantization [--seeds 0 1 2] [--parts demo large steered]

The demo's model: from each seed's warm start, on each kind of base, the demo's search; accuracy on the test problems
before and after. A random model of about 100 M parameters: memory and tokens/s, and, for it knows no right answers, how far a
short search steers it to tokens of even number, on the prompts it was searched on. Kinds of base are measured in turns, so
that whatever else the machine does slows all of them.
`results/quantization.json` keeps the numbers, `.md` the tables.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from essa.checkpoint import Run
from essa.config import ESSAConfig
from essa.demo import task
from essa.demo.run import MAX_NEW_TOKENS, SEARCH, test_accuracy
from essa.demo.warm_start import BASE_MODEL, make_warm_start
from essa.models import ModelSource, load_base
from essa.quantization import weight_bytes
from essa.rollout import generate
from essa.trainer import ESSATrainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.memory import with_lora
from essa_kernels.nn import SVDLoRA

RESULTS = Path(__file__).parent / "results" / "quantization"
KINDS = (("none", "float32"), ("none", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16"))
LARGE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}
PARTS = ("demo", "large", "steered")
TURNS = 3
STEERING: dict[str, Any] = {
    "strategy": "cma-diagonal",
    "sigma": 0.3,
    "population_size": 16,
    "prompts_per_generation": 8,
    "generations": 12,
    "max_new_tokens": 8,
    "row_budget": 128,
}


def demo_run(warm_start: Path, seed: int, quantization: str, dtype: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        args = ESSAConfig(
            str(Path(folder, "run")),
            seed=seed,
            max_new_tokens=MAX_NEW_TOKENS,
            progress=False,
            **{**SEARCH, "eval_steps": 15},
        )
        trainer = ESSATrainer(
            ModelSource(str(BASE_MODEL), str(warm_start), dtype=dtype, quantization=quantization),
            "exact_match",
            args,
            task.rows(task.split("train")),
            task.rows(task.split("validation")),
        )
        before = test_accuracy(trainer)
        said = [completion.text for completion in greedy(trainer)]
        trainer.train()
        return {
            "seed": seed,
            "before": before,
            "after": test_accuracy(trainer),
            "bytes": weight_bytes(load_base(str(BASE_MODEL), dtype=dtype, quantization=quantization)[0]),
            "said": said,
        }


def greedy(trainer: ESSATrainer) -> list[Any]:
    prompts = [row["prompt"] for row in task.rows(task.split("test"))]
    return generate(trainer.model, trainer.processing_class, prompts, max_new_tokens=MAX_NEW_TOKENS).completions[0]


def speeds(sources: dict[str, tuple[Any, Any]], prompts: list[str], members: int, new_tokens: int) -> dict[str, float]:
    """Tokens/s of a population on each model, the best of a few turns."""
    best = dict.fromkeys(sources, 0.0)
    spaces = {kind: SVDLoRA.from_peft(model) for kind, (model, _) in sources.items()}
    for _ in range(TURNS):
        for kind, (model, tokenizer) in sources.items():
            space = spaces[kind]
            values = space.spectrum.repeat(members, 1)
            rollout = generate(
                model, tokenizer, prompts, space=space, values=values, max_new_tokens=new_tokens, row_budget=64
            )
            best[kind] = max(best[kind], rollout.tokens / rollout.seconds)
    return best


def demo_part(seeds: list[int]) -> list[dict[str, Any]]:
    runs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            warm_start = Path(folder, f"warm_start{seed}")
            make_warm_start(warm_start, seed)
            for quantization, dtype in KINDS:
                run = demo_run(warm_start, seed, quantization, dtype)
                runs.setdefault(f"{quantization} {dtype}", []).append(run)
                print(quantization, dtype, {name: value for name, value in run.items() if name != "said"}, flush=True)
        models = {
            f"{quantization} {dtype}": ModelSource(
                str(BASE_MODEL), str(warm_start), dtype=dtype, quantization=quantization
            ).load()
            for quantization, dtype in KINDS
        }
        rates = speeds(models, [row["prompt"] for row in task.rows(task.split("test")[:8])], 32, MAX_NEW_TOKENS)
    exact = runs["none float32"]
    rows = []
    for kind, of_kind in runs.items():
        differing = [
            statistics.mean(a != b for a, b in zip(run["said"], reference["said"], strict=True))
            for run, reference in zip(of_kind, exact, strict=True)
        ]
        rows.append(
            {
                "base": kind,
                "bytes": of_kind[0]["bytes"],
                "tokens_per_second": rates[kind],
                "before": [run["before"] for run in of_kind],
                "after": [run["after"] for run in of_kind],
                "differing": differing,
            }
        )
    return rows


def save_large(folder: str) -> int:
    """Write the random model and a tokenizer for it; how many parameters it has."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **LARGE))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE_MODEL).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def with_seeded_lora(base: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return with_lora(base, ["q_proj", "v_proj", "down_proj"], std=0.02).eval()


def large_part() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_large(folder)
        models = {}
        for quantization, dtype in KINDS:
            base, tokenizer = load_base(folder, dtype=dtype, quantization=quantization)
            size = weight_bytes(base)
            models[f"{quantization} {dtype}"] = (with_seeded_lora(base, 0), tokenizer, size)
        rates = speeds({kind: (m, t) for kind, (m, t, _) in models.items()}, ["1+1=" * 8] * 4, 16, 8)
    return [
        {"base": kind, "parameters": parameters, "bytes": size, "tokens_per_second": rates[kind]}
        for kind, (_, _, size) in models.items()
    ]


def share_of_even(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [statistics.mean(token % 2 == 0 for token in tokens) for tokens in completion_ids]


def steered_part(seeds: list[int]) -> dict[str, dict[str, list[float]]]:
    """The share of even tokens before and after a search, for each kind of base."""
    shares: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_large(folder)
        for seed in seeds:
            letters = random.Random(seed)
            prompts = [{"prompt": "".join(letters.choices("0123456789+=", k=16))} for _ in range(8)]
            for quantization, dtype in KINDS:
                base, tokenizer = load_base(folder, dtype=dtype, quantization=quantization)
                args = ESSAConfig(
                    str(Path(folder, "runs", quantization, dtype, str(seed))), seed=seed, progress=False, **STEERING
                )
                model = with_seeded_lora(base, seed)
                trainer = ESSATrainer(model, share_of_even, args, prompts, prompts, processing_class=tokenizer)
                trainer.train()
                evaluations = [
                    r["evaluation"]["reward"] for r in Run.read(args.output_dir).records if "evaluation" in r
                ]
                of_kind = shares.setdefault(f"{quantization} {dtype}", {"before": [], "after": []})
                of_kind["before"].append(evaluations[0])
                of_kind["after"].append(evaluations[-1])
                print(quantization, dtype, seed, evaluations, flush=True)
    return shares


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})"


def before_after_gain(run: dict[str, Any]) -> str:
    """Three cells of a table."""
    gain = [after - before for before, after in zip(run["before"], run["after"], strict=True)]
    return f"{spread(run['before'])} | {spread(run['after'])} | {spread(gain)}"


def tables(results: dict[str, Any]) -> str:
    lines = [
        (
            f"torch {torch.__version__} on the CPU, {results['threads']} thread; means over {results['seeds']} seeds, with the "
            "smallest and the largest. Tokens/s: best of three turns, and as a multiple of float32's. int8 and int4 are "
            "torchao's, weights only; the adapter and the population's delta are in the base's dtype."
        ),
        "",
        "Command: `python -m benchmarks.quantization`",
        "",
    ]
    if demo := results.get("demo"):
        exact = demo[0]["tokens_per_second"]
        lines += [
            "The demo's model (0.3 M parameters), its search of 45 generations:",
            "",
            "| base | MiB | tokens/s | accuracy before | accuracy after | gain | greedy completions unlike float32's |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in demo:
            lines.append(
                f"| {row['base']} | {row['bytes'] / 2**20:.2f} | {row['tokens_per_second']:,.0f} "
                f"({row['tokens_per_second'] / exact:.2f}x) | {before_after_gain(row)} "
                f"| {statistics.mean(row['differing']):.1%} |"
            )
        lines.append("")
    if large := results.get("large"):
        exact = large[0]["tokens_per_second"]
        lines += [
            (
                f"A random model of {large[0]['parameters'] / 1e6:.0f} M parameters, 16 members x 4 prompts of 32 tokens, 8 new "
                "tokens, 64 rows to a batch. Random as it is, no answer of it is right: it is steered to tokens of even number by "
                f"{STEERING['generations']} generations of {STEERING['population_size']} members x "
                f"{STEERING['prompts_per_generation']} prompts, always the same, and their share is that on these prompts:"
            ),
            "",
            "| base | MiB | of float32's | tokens/s | even tokens before | even tokens after | gain |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in large:
            steered = results.get("steered", {}).get(row["base"])
            lines.append(
                f"| {row['base']} | {row['bytes'] / 2**20:,.0f} | {row['bytes'] / large[0]['bytes']:.2f} "
                f"| {row['tokens_per_second']:,.0f} ({row['tokens_per_second'] / exact:.2f}x) "
                f"| {before_after_gain(steered) if steered else '| |'} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = RESULTS.with_suffix(".json")
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results |= {"threads": options.threads}
    if "demo" in options.parts:
        results |= {"demo": demo_part(options.seeds), "seeds": len(options.seeds)}
    if "large" in options.parts:
        results |= {"large": large_part()}
    if "steered" in options.parts:
        results |= {"steered": steered_part(options.seeds)}
    path.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(tables(results))
    print(tables(results))


if __name__ == "__main__":
    main()
