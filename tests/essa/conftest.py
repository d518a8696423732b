from __future__ import annotations

from pathlib import Path

import pytest

import essa.demo
from essa.demo import task

BASE_MODEL = Path(essa.demo.__file__).parent / "base_model"
CHAT_TEMPLATE = (
    "{% for message in messages %}?{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


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
