from __future__ import annotations

import pytest
import torch
from essa.demo import task
from essa.demo.warm_start import BASE_MODEL

CHAT_TEMPLATE = (
    "{% for message in messages %}?{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture
def one_thread():
    """As the workers have. And a forked child has the parent's memory but not its threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes longer than the searches of these tests; those that look at the drawing ask for `pictures`."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("essa.report.picture", lambda draw, title, size: (b"\x89PNG", "<svg></svg>"))
        monkeypatch.setattr(
            "essa.report._draw", lambda curves, title: (b"\x89PNG", f"<svg>{[curve.name for curve in curves]}</svg>")
        )


@pytest.fixture
def pictures():
    """Let reports draw their curves."""


@pytest.fixture
def tokenizer():
    from essa.models import load_tokenizer

    return load_tokenizer(str(BASE_MODEL))


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def problems():
    """Rows of the demo's task: `(train, evaluation)`."""
    return task.rows(task.split("train")[:40]), task.rows(task.split("validation")[:30])


@pytest.fixture(scope="session")
def warm_start(tmp_path_factory):
    """Folder of a LoRA adapter trained, briefly, on a mixture of right and wrong answers."""
    import random

    from essa.config import SFTConfig
    from essa.models import load_base
    from essa.sft import sft

    pairs = task.demonstrations(task.split("train"), 600, task.DEMONSTRATION_MIXTURE, random.Random(0))
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    folder = tmp_path_factory.mktemp("warm_start") / "adapter"
    model, tokenizer = load_base(str(BASE_MODEL))
    sft(model, tokenizer, rows, SFTConfig(str(folder), max_steps=60, batch_size=32, learning_rate=2e-3))
    return str(folder)


@pytest.fixture
def retrained():
    """Change the matrices in a file of weights a little, as more training would."""
    import torch
    from safetensors.torch import load_file, save_file

    def change(path):
        weights = load_file(path)
        for weight in weights.values():
            if weight.dim() == 2:
                weight += 1e-3 * torch.randn(weight.shape)
        save_file(weights, path, metadata={"format": "pt"})

    return change


@pytest.fixture
def make_trainer(problems, warm_start, tmp_path):
    """A small trainer on the demo's task; keyword arguments go to `ESSAConfig`, or override the trainer's own."""
    from essa import ESSAConfig, ESSATrainer

    def make(output_dir="run", *, reward_funcs="exact_match", callbacks=None, **settings):
        train, evaluation = problems
        own = {
            "model": str(BASE_MODEL),
            "adapter": warm_start,
            "train_dataset": train,
            "eval_dataset": evaluation,
            "processing_class": None,
        }
        own = {name: settings.pop(name, value) for name, value in own.items()}
        small = {"population_size": 16, "prompts_per_generation": 4, "generations": 4, "max_new_tokens": 4}
        args = ESSAConfig(str(tmp_path / output_dir), **{**small, "progress": False, **settings})
        return ESSATrainer(reward_funcs=reward_funcs, args=args, callbacks=callbacks, **own)

    return make
