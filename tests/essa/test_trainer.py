from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from essa import ESSAConfig, ESSATrainer
from essa.checkpoint import HISTORY_FILE, RUN_FILE, Run
from essa.config import InputError
from essa.demo.warm_start import BASE_MODEL
from essa.models import ModelSource, load_adapter, load_base
from essa.rewards import RewardError
from essa.strategies import STRATEGIES
from transformers import AutoConfig, AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

TIMING = ("seconds", "rollout_seconds")
METHODS = {strategy: {"strategy": strategy} for strategy in STRATEGIES} | {
    "lora": {"parametrization": "lora", "optimizer": "momentum", "perturbation": "completion"},
    "lowrank": {"parametrization": "lowrank", "optimizer": "adam", "noise": "rademacher", "noise_rank": 2},
    "full": {"parametrization": "full", "reward_shaping": "per-prompt", "weight_decay": 0.1},
}


def adapter_bytes(trainer) -> dict[str, bytes]:
    folder = Path(trainer.args.output_dir, trainer.search.space.output)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def untimed_history(trainer) -> list[dict]:
    def untimed(value):
        if isinstance(value, dict):
            return {name: untimed(inner) for name, inner in value.items() if name not in TIMING}
        return value

    return [untimed(record) for record in Run.read(trainer.args.output_dir).records]


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True


@pytest.fixture(scope="module")
def finished():
    """Runs of a whole search, shared by the tests of this module: method -> (adapter, history)."""
    return {}


@pytest.fixture
def reference(finished, make_trainer):
    def get(method):
        if method not in finished:
            trainer = make_trainer("reference", **METHODS[method], eval_steps=2)
            trainer.train()
            finished[method] = adapter_bytes(trainer), untimed_history(trainer)
        return finished[method]

    return get


@pytest.mark.parametrize(
    "method",
    [
        {"strategy": "es-per-completion", "population_size": 64, "prompts_per_generation": 8},
        {"strategy": "es"},
        {"strategy": "cma"},
        {"strategy": "cma-diagonal"},
        {"strategy": "es", "optimizer": "momentum", "reward_shaping": "centred-rank"},
        {"parametrization": "lora", "learning_rate": 0.001},
        {"parametrization": "lowrank"},
        {"parametrization": "full"},
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_a_search_finds_the_right_answers_and_what_it_saves_holds_them(make_trainer, problems, method):
    """In plain PEFT or transformers, where nothing of this project is loaded."""
    trainer = make_trainer(**{"prompts_per_generation": 16, "generations": 25, **method})
    summary = trainer.train()
    assert summary["eval_reward"] >= summary["eval_reward_before"] + 0.2
    folder, output = Path(trainer.args.output_dir), trainer.search.space.output
    weights = {"adapter": "adapter/adapter_model.safetensors", "model": "model/model.safetensors"}[output]
    for name in (RUN_FILE, HISTORY_FILE, "report.html", "report.png", weights):
        assert (folder / name).stat().st_size > 0

    from peft import PeftModel

    if output == "adapter":
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_MODEL), str(folder / output))
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder / output)
    tokenizer = trainer.processing_class
    _, evaluation = problems
    batch = tokenizer([row["prompt"] for row in evaluation], return_tensors="pt")
    out = plain.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch.input_ids.shape[1] :]
    texts = [text.replace(" ", "") for text in tokenizer.batch_decode(out, skip_special_tokens=True)]
    right = [text == row["answer"] for text, row in zip(texts, evaluation, strict=True)]
    assert summary["eval_reward"] == pytest.approx(np.mean(right))

    # The trainer's own model carries the result, as GRPOTrainer's does.
    live = trainer.model.generate(**batch, max_new_tokens=4, do_sample=False)[:, batch.input_ids.shape[1] :]
    assert torch.equal(live, out)
    assert trainer.evaluate()["eval_reward"] == summary["eval_reward"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_its_seed(reference, make_trainer, method):
    adapter, history = reference(method)
    again = make_trainer(**METHODS[method], eval_steps=2)
    again.train()
    assert adapter_bytes(again) == adapter
    assert untimed_history(again) == history
    other = make_trainer("other", **METHODS[method], eval_steps=2, seed=1)
    other.train()
    assert adapter_bytes(other) != adapter


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_in_the_same_bits(reference, make_trainer, method):
    adapter, history = reference(method)
    stop = StopAfter(1)
    trainer = make_trainer(**METHODS[method], eval_steps=2, callbacks=[stop])
    trainer.train()
    stop.step = 3
    trainer.train(resume_from_checkpoint=True)  # the same trainer, whose model carries what was found so far
    last = make_trainer(**METHODS[method], eval_steps=2)
    last.train(resume_from_checkpoint=last.args.output_dir)
    assert adapter_bytes(last) == adapter
    searched = [record for record in untimed_history(last) if "rewards" in record]
    assert searched == [record for record in history if "rewards" in record]


def test_sampled_completions_resume_too(make_trainer):
    whole = make_trainer("whole", temperature=1.0)
    whole.train()
    make_trainer(temperature=1.0, callbacks=[StopAfter(2)]).train()
    resumed = make_trainer(temperature=1.0)
    resumed.train(resume_from_checkpoint=True)
    assert adapter_bytes(resumed) == adapter_bytes(whole)


def test_one_trainer_can_stop_and_go_on(reference, make_trainer):
    adapter, _ = reference("cma")
    stop = StopAfter(2)
    trainer = make_trainer(strategy="cma", eval_steps=2, callbacks=[stop])
    trainer.train()
    stop.step = 99
    trainer.train(resume_from_checkpoint=True)
    assert adapter_bytes(trainer) == adapter


def test_a_finished_run_can_be_asked_for_more(reference, make_trainer):
    adapter, _ = reference("cma")
    make_trainer(strategy="cma", generations=2).train()
    more = make_trainer(strategy="cma", generations=4)
    more.train(resume_from_checkpoint=True)
    assert adapter_bytes(more) == adapter
    with pytest.raises(InputError, match="generations must be at least the 4 the run already has, got 3"):
        make_trainer(strategy="cma", generations=3).train(resume_from_checkpoint=True)


class Failing:
    """exact_match until its n-th call, which raises."""

    __module__, __qualname__ = "tests", "failing"

    def __init__(self, call, error):
        self.call, self.error, self.calls = call, error, 0

    def __call__(self, completions, answer, **kwargs):
        self.calls += 1
        if self.calls >= self.call:
            raise self.error
        return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (KeyError("x"), RewardError)])
def test_a_run_that_broke_off_can_be_resumed(make_trainer, capsys, error, raised):
    whole = make_trainer("whole", reward_funcs=Failing(99, None))
    whole.train()
    broken = make_trainer(reward_funcs=Failing(4, error))
    with pytest.raises(raised) as caught:
        broken.train()
    told = capsys.readouterr().err + str(caught.value)
    assert "Stopped after generation 2 of 4" in told
    assert f"--resume_from_checkpoint {broken.args.output_dir}" in told
    resumed = make_trainer(reward_funcs=Failing(99, None))
    resumed.train(resume_from_checkpoint=True)
    assert adapter_bytes(resumed) == adapter_bytes(whole)


def test_a_reward_error_names_function_prompt_and_member(make_trainer):
    def fragile(completions, **kwargs):
        return [float("nan") if n == 5 else 0.0 for n in range(len(completions))]

    trainer = make_trainer(reward_funcs=fragile, strategy="cma", eval_dataset=None)
    prompt = trainer._sampler.indices(0)[1]
    with pytest.raises(RewardError, match=rf"fragile' returned nan.*member 1, prompt {prompt} of train_dataset"):
        trainer.train()


def test_resume_refuses_other_settings_data_rewards_and_models(make_trainer, problems):
    make_trainer(generations=1, sigma=0.3).train()
    train, evaluation = problems
    for change, message in (
        ({"sigma": 0.7}, "settings sigma was 0.3, now 0.7"),
        ({"seed": 5}, "settings seed was 0, now 5"),
        ({"train_dataset": train[::-1]}, "dataset sha256 was"),
        ({"eval_dataset": evaluation[:5]}, "eval_dataset rows was 30, now 5"),
        ({"reward_funcs": lambda completions, **kwargs: [0.0] * len(completions)}, "rewards was"),
        ({"generations": 9, "eval_steps": 3, "logging_steps": 7}, None),
    ):
        trainer = make_trainer(**{"generations": 1, "sigma": 0.3, **change})
        if message is None:
            trainer.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(InputError, match=re.escape(message)):
                trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_resume_refuses_a_base_that_was_trained_on(make_trainer, retrained, tmp_path, quantization):
    if quantization != "none":
        pytest.importorskip("torchao")
    base = shutil.copytree(BASE_MODEL, tmp_path / "base")
    settings = {"model": str(base), "generations": 1, "quantization": quantization}
    make_trainer(**settings).train()
    make_trainer(**settings).train(resume_from_checkpoint=True)
    retrained(base / "model.safetensors")
    with pytest.raises(InputError, match="cannot be resumed with other settings: model base_weights was"):
        make_trainer(**settings).train(resume_from_checkpoint=True)


def test_resume_refuses_a_damaged_or_missing_run(make_trainer):
    trainer = make_trainer(generations=2)
    with pytest.raises(InputError, match="no run to resume"):
        trainer.train(resume_from_checkpoint=True)
    assert not Path(trainer.args.output_dir).exists()
    trainer.train()
    with pytest.raises(InputError, match="already holds a run"):
        make_trainer().train()
    with pytest.raises(InputError, match="must be the run's own output_dir"):
        trainer.train(resume_from_checkpoint="elsewhere")
    history = Path(trainer.args.output_dir, HISTORY_FILE)
    history.write_bytes(history.read_bytes().replace(b"1.0", b"0.0", 1))
    with pytest.raises(InputError, match="was altered or belongs to another run"):
        make_trainer(generations=2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": None}, "carries no LoRA adapter.*essa sft"),
        ({"adapter": "/no/such/adapter"}, "is not a folder.*essa sft"),
        ({"adapter": str(BASE_MODEL)}, "not a PEFT adapter folder: it has no adapter_config.json"),
        ({"model": "/no/such/model"}, "model_name_or_path '/no/such/model' cannot be loaded"),
        ({"model": 3}, "model must be a name, a PeftModel or a transformers model, got int"),
        ({"train_dataset": None}, "train_dataset must be given"),
        ({"train_dataset": []}, "train_dataset is empty"),
        ({"train_dataset": [{"question": "1"}]}, "train_dataset row 0 has no `prompt`"),
        ({"train_dataset": [{"prompt": "?1+1="}] * 9}, "exact_match' needs a column 'answer'"),
        ({"eval_dataset": [{"prompt": 1, "answer": "2"}]}, "eval_dataset row 0: `prompt` must be text"),
        ({"train_dataset": [{"prompt": "1" * 99, "answer": "2"}]}, "row 0: the prompt has 99 tokens, but only"),
        ({"prompts_per_generation": 41, "population_size": 82}, "prompts_per_generation must be at most the 40"),
        ({"strategy": "cma-diagnal"}, "did you mean 'cma-diagonal'"),
        ({"strategy": "es-per-completion", "population_size": 6}, "population_size"),
        ({"strategy": "zo-grpo", "temperature": 0.0}, "temperature.*zo-grpo"),
        ({"parametrization": "lora", "strategy": "cma"}, "parametrization 'lora' has .* and takes 'es'"),
        ({"parametrization": "full", "perturbation": "completion"}, "'full' computes one member at a time"),
        ({"parametrization": "lowrank", "population_size": 15}, "members come in mirrored pairs"),
        ({"strategy": "cma", "optimizer": "adam"}, "optimizer: got 'adam', but only strategy 'es' has it"),
        ({"reward_funcs": "exact-match"}, "did you mean 'exact_match'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not there"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda"),
        ({"callbacks": [print]}, "callbacks must be transformers TrainerCallbacks"),
        ({"callbacks": [EarlyStoppingCallback], "eval_steps": 0}, "EarlyStoppingCallback needs .* eval_steps above 0"),
        ({"callbacks": [EarlyStoppingCallback], "eval_dataset": None}, "EarlyStoppingCallback needs an eval_dataset"),
        ({"load_best_model_at_end": True, "eval_dataset": None}, "load_best_model_at_end needs an eval_dataset"),
        ({"eval_dataset": {"easy": [], "hard": []}}, "eval_dataset must be one dataset, got a dict of 'easy', 'hard'"),
        (
            {"chat_template_kwargs": {"a": 1}},
            "chat_template_kwargs needs prompts that are messages, but those of train",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(make_trainer, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        make_trainer(**change)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}])
def test_an_adapter_of_another_model_is_refused(make_trainer, tokenizer, change):
    layers = change.get("num_hidden_layers", 3)
    config = AutoConfig.from_pretrained(BASE_MODEL, **change, layer_types=["full_attention"] * layers)
    with pytest.raises(InputError, match="does not fit this model"):
        make_trainer(model=AutoModelForCausalLM.from_config(config), processing_class=tokenizer)


def test_an_adapter_that_singular_values_cannot_carry_is_refused(make_trainer):
    from peft import LoraConfig, get_peft_model

    base, _ = load_base(str(BASE_MODEL))
    dora = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(InputError, match=r"(?i)dora"):
        make_trainer(model=dora, adapter=None)


def test_a_model_source_needs_no_settings(problems, warm_start, tmp_path):
    base = shutil.copytree(BASE_MODEL, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    trainer = ESSATrainer(ModelSource(str(base), warm_start), "exact_match", train_dataset=problems[0])
    assert trainer.args == ESSAConfig("base-ESSA")


@pytest.mark.parametrize(
    ("place", "message"), [("", "was not loaded from where"), ("./gone", "no tokenizer at './gone'")]
)
def test_a_model_without_its_tokenizer_is_named(make_trainer, place, message):
    base, _ = load_base(str(BASE_MODEL))
    base.config._name_or_path = place
    with pytest.raises(InputError, match=f"processing_class must be given: .*{message}"):
        make_trainer(model=base)


def test_models_that_carry_their_adapter(reference, make_trainer, warm_start):
    adapter, _ = reference("cma")
    peft_model = load_adapter(load_base(str(BASE_MODEL))[0], warm_start)
    trainer = make_trainer(model=peft_model, adapter=None, strategy="cma", eval_steps=2)
    trainer.train()
    assert adapter_bytes(trainer)["adapter_model.safetensors"] == adapter["adapter_model.safetensors"]

    injected, _ = load_base(str(BASE_MODEL))
    injected.load_adapter(warm_start)
    trainer = make_trainer("injected", model=injected, adapter=None, strategy="cma", eval_steps=2)
    trainer.train()
    assert adapter_bytes(trainer)["adapter_model.safetensors"] == adapter["adapter_model.safetensors"]
    with pytest.raises(InputError, match="must not be given for a model that already carries"):
        make_trainer(model=injected)


def test_alpha_and_offset_mode_decide_which_values_move_and_how(make_trainer):
    trainer = make_trainer(alpha=0.5, offset_mode="relative")
    space = trainer.search.space
    searched, start = space.searched, space.lora.spectrum
    assert torch.equal(searched, space.lora.top(0.5))
    offsets = np.linspace(-0.5, 0.5, 2 * len(searched), dtype=np.float32).reshape(2, -1)
    values = space.values(torch.from_numpy(offsets))
    kept = torch.ones(len(start), dtype=torch.bool)
    kept[searched] = False
    assert torch.equal(values[:, kept], start[kept].expand(2, -1))
    torch.testing.assert_close(values[:, searched], start[searched] * (1 + torch.from_numpy(offsets)))
    trainer.train()
    found = space.values(space.parameters[0][None])[0]
    assert torch.equal(found[kept], start[kept])
    assert not torch.equal(found[searched], start[searched])

    absolute = make_trainer("absolute", alpha=0.5).search.space.values(torch.from_numpy(offsets))
    torch.testing.assert_close(absolute[:, searched], start[searched] + torch.from_numpy(offsets))


def test_messages_and_trls_rewards(make_trainer, problems, chat_tokenizer):
    train, evaluation = (
        [{"prompt": [{"role": "user", "content": row["prompt"][1:-1]}], "solution": row["answer"]} for row in rows]
        for rows in problems
    )
    text = make_trainer("text", strategy="cma")
    text.train()
    seen = []

    def reward(prompts, completions, completion_ids, solution, trainer_state, **kwargs):
        seen.append((prompts[0], completions[0], trainer_state.global_step))
        return [float(c[0]["content"] == s) for c, s in zip(completions, solution, strict=True)]

    chat = make_trainer(
        "chat",
        strategy="cma",
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=chat_tokenizer,
        reward_funcs=reward,
    )
    chat.train()
    assert adapter_bytes(chat) == adapter_bytes(text)
    prompt, completion, step = seen[1]
    assert prompt[0]["role"] == "user" and completion[0]["role"] == "assistant" and step == 0


def test_arguments_of_the_chat_template(make_trainer, problems, chat_tokenizer):
    chat_tokenizer.chat_template = "{{ mark }}" + chat_tokenizer.chat_template
    train, evaluation = (
        [{"prompt": [{"role": "user", "content": row["prompt"][1:-1]}], "answer": row["answer"]} for row in rows]
        for rows in problems
    )
    settings = {"train_dataset": train, "eval_dataset": evaluation, "processing_class": chat_tokenizer}
    trainer = make_trainer(**settings, generations=1, chat_template_kwargs={"mark": "="})
    assert trainer.train_prompts.texts == ["=" + row["prompt"] for row in problems[0]]
    assert trainer.eval_prompts.texts == ["=" + row["prompt"] for row in problems[1]]
    trainer.train()
    own = [{**row, "chat_template_kwargs": {"mark": "<"} if i == 3 else None} for i, row in enumerate(train)]
    texts = make_trainer(
        "own", **settings | {"train_dataset": own}, chat_template_kwargs={"mark": "="}
    ).train_prompts.texts
    assert [text[0] for text in texts] == ["=", "=", "=", "<", *"=" * (len(train) - 4)]
    with pytest.raises(InputError, match=r"settings chat_template_kwargs was \{'mark': '='\}, now None"):
        make_trainer(**settings, generations=1).train(resume_from_checkpoint=True)


class Recorder(TrainerCallback):
    def __init__(self):
        self.events = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: self.events.append((name, state.global_step, kwargs))
        return object.__getattribute__(self, name)


def test_callbacks_see_the_run(make_trainer):
    recorder = Recorder()
    trainer = make_trainer(
        generations=3, eval_steps=2, save_steps=2, logging_steps=2, callbacks=[recorder], strategy="cma"
    )
    trainer.train()
    steps = {}
    for name, step, _ in recorder.events:
        steps.setdefault(name, []).append(step)
    assert steps == {
        "on_init_end": [0],
        "on_train_begin": [0],
        "on_step_begin": [0, 1, 2],
        "on_step_end": [1, 2, 3],
        "on_evaluate": [0, 2, 3],
        "on_log": [0, 2, 2, 3, 3],
        "on_save": [2],
        "on_train_end": [3],
    }
    evaluated, logs = (kwargs["logs"] for name, step, kwargs in recorder.events if (name, step) == ("on_log", 2))
    assert {"eval_reward", "eval_seconds", "epoch"} <= evaluated.keys()
    assert {"reward", "reward_best", "reward_std", "sigma", "samples_per_second", "epoch"} <= logs.keys()
    assert all(isinstance(value, (int, float)) for value in logs.values())
    assert recorder.events[1][2]["model"] is trainer.model
    assert [entry["step"] for entry in trainer.state.log_history] == [0, 2, 2, 3, 3]


def best_at_two(completions, trainer_state, **kwargs):
    """A reward that rises to generation 2 and falls from there."""
    return [1.0 / (1 + abs(trainer_state.global_step - 2))] * len(completions)


def test_the_best_mean_can_be_kept_instead_of_the_last(make_trainer):
    settings = {"reward_funcs": best_at_two, "strategy": "cma", "eval_steps": 1}
    two = make_trainer("two", generations=2, **settings)
    two.train()
    best = make_trainer("best", load_best_model_at_end=True, **settings)
    assert best.train()["eval_reward"] == 1.0
    assert best.state.best_global_step == 2
    assert adapter_bytes(best) == adapter_bytes(two)


def test_best_is_what_the_settings_say(make_trainer):
    def shorter_and_shorter(completions, trainer_state, **kwargs):
        return [1.0 - 0.1 * trainer_state.global_step] * len(completions)

    settings = {"reward_funcs": shorter_and_shorter, "eval_steps": 1, "load_best_model_at_end": True}
    least = make_trainer(**settings, metric_for_best_model="eval_reward", greater_is_better=False)
    assert least.train()["eval_reward"] == pytest.approx(0.6)
    assert least.state.best_global_step == 4
    slow = make_trainer("slow", **settings, metric_for_best_model="seconds")
    summary = slow.train()
    assert slow.state.best_metric == max(evaluation["seconds"] for evaluation in slow.evaluations.values())
    assert summary["eval_reward"] == slow.evaluations[slow.state.best_global_step]["reward"]


def test_transformers_early_stopping(make_trainer):
    settings = {"reward_funcs": best_at_two, "strategy": "cma", "eval_steps": 1}
    two = make_trainer("two", generations=2, **settings)
    two.train()
    patient = EarlyStoppingCallback(early_stopping_patience=3)
    trainer = make_trainer(generations=9, load_best_model_at_end=True, callbacks=[patient], **settings)
    assert trainer.train()["generations"] == 5
    assert adapter_bytes(trainer) == adapter_bytes(two)


def test_early_stopping_is_as_patient_in_a_resumed_run(make_trainer):
    def falling(completions, trainer_state, **kwargs):
        return [-float(trainer_state.global_step)] * len(completions)

    settings = {"reward_funcs": falling, "strategy": "cma", "eval_steps": 1, "generations": 9}
    killed = make_trainer(callbacks=[EarlyStoppingCallback(4), StopAfter(3)], **settings)
    killed.train()
    for _ in range(2):
        resumed = make_trainer(callbacks=[EarlyStoppingCallback(4)], **settings)
        assert resumed.train(resume_from_checkpoint=True)["generations"] == 4


def test_callbacks_come_and_go(make_trainer):
    trainer = make_trainer(generations=1)
    trainer.add_callback(StopAfter(1))
    trainer.add_callback(recorder := Recorder())
    trainer.add_callback(EarlyStoppingCallback)
    assert isinstance(trainer.pop_callback(EarlyStoppingCallback), EarlyStoppingCallback)
    assert trainer.pop_callback(EarlyStoppingCallback) is None
    trainer.remove_callback(StopAfter)
    assert trainer.callbacks == [recorder]
    trainer.train()
    assert recorder.events
    assert trainer.pop_callback(recorder) is recorder and not trainer.callbacks
    with pytest.raises(InputError, match="callbacks must be transformers TrainerCallbacks, got builtin_function_or"):
        trainer.add_callback(print)


def test_any_dataset_can_be_evaluated_on(make_trainer, problems):
    train, evaluation = problems
    trainer = make_trainer(eval_dataset=None)
    trainer.train()
    whole, part = trainer.evaluate(train + evaluation), trainer.evaluate(train, metric_key_prefix="train")
    rest = trainer.evaluate(evaluation)
    assert whole["eval_samples"] == 70 and part["train_samples"] == 40
    assert 70 * whole["eval_reward"] == pytest.approx(40 * part["train_reward"] + 30 * rest["eval_reward"])
    with pytest.raises(InputError, match="eval_dataset row 0 has no `prompt`"):
        trainer.evaluate([{"question": "1"}])
    with pytest.raises(InputError, match="needs an eval_dataset"):  # none of them is kept
        trainer.evaluate()


def test_without_an_evaluation_set(make_trainer):
    trainer = make_trainer(eval_dataset=None)
    assert "eval_reward" not in trainer.train()
    with pytest.raises(InputError, match="needs an eval_dataset"):
        trainer.evaluate()


@pytest.mark.parametrize("reporter", ["tensorboard", "wandb"])
def test_a_missing_reporter_is_named(make_trainer, reporter):
    import importlib.util

    if importlib.util.find_spec(reporter):
        pytest.skip(f"{reporter} is installed")
    for given in (reporter, [reporter]):
        with pytest.raises(InputError, match=f"pip install {reporter}"):
            make_trainer(report_to=given)


def test_several_reporters(make_trainer, monkeypatch):
    class Board(TrainerCallback):
        pass

    class Wandb(TrainerCallback):
        pass

    kinds = {"tensorboard": [Board], "wandb": [Wandb]}
    monkeypatch.setattr("transformers.integrations.get_reporting_integration_callbacks", kinds.get)
    trainer = make_trainer(report_to=["tensorboard", "wandb"], callbacks=[TrainerCallback])
    assert [type(callback) for callback in trainer.callbacks] == [TrainerCallback, Board, Wandb]


def test_run_json_says_what_the_run_was(make_trainer):
    trainer = make_trainer(generations=1)
    trainer.train()
    content = json.loads(Path(trainer.args.output_dir, RUN_FILE).read_text())
    assert content["identity"]["settings"]["strategy"] == trainer.search.strategy.name
    assert content["identity"]["noise_version"] == 1
    assert content["about"]["environment"]["packages"]["torch"] == importlib.metadata.version("torch")
