"""The reference policy: the model's own trainable weights as they were, kept beside it and moved towards it.

There is no second model. Its weights take the policy's place for the length of a forward pass, so with LoRA the
reference costs the memory of one adapter, and with full fine-tuning that of the weights.

They are kept in float32 and mixed in float64, whatever the dtype of the policy. In bfloat16 a mix with a small alpha is
lost: 1 + 0.01 x (1.1 - 1) rounds to 1.

With LoRA the factors A and B are what is mixed, each as any other weight. Their product then differs from the mix of the
products, which no adapter of the same rank could hold; with alpha = 1 there is no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from essa.checkpoint import write_atomically
from essa.config import InputError
from essa.models import bare

WEIGHTS_FILE, STATE_FILE = "reference.safetensors", "reference.json"
FORMAT = 1
BLOCK = 1 << 20


@torch.no_grad()
def mix_(reference: Tensor, policy: Tensor, alpha: float) -> None:
    """reference <- alpha policy + (1 - alpha) reference, in place: float32, each element rounded once from float64.

    Args:
        reference: contiguous float32.
        policy: any floating dtype, the same shape.
        alpha: in [0, 1]. 0 leaves the reference's bits alone and 1 takes the policy's.
    """
    for old, new in zip(reference.view(-1).split(BLOCK), policy.detach().reshape(-1).split(BLOCK), strict=True):
        old.copy_(old.double().mul_(1.0 - alpha).add_(new.double(), alpha=alpha))


class MovingReference:
    """The reference of one model.

    Args:
        model: a PeftModel with one active LoRA adapter, or a transformers model to be fine-tuned as a whole. The
            reference starts as a copy of its trainable weights.
        start: a model of the same shape whose weights the reference starts from instead.

    Attributes:
        updates: how often the reference has moved.
        last_update: the optimiser step of the last move, 0 before the first.
    """

    def __init__(self, model: nn.Module, start: nn.Module | None = None) -> None:
        check_trainable(model)
        self._model = model
        self._policy = {name: p for name, p in model.named_parameters() if p.requires_grad}
        source = self._policy if start is None else _matching(self._policy, start)
        self._exact = {name: p.detach().to(torch.float32, copy=True).contiguous() for name, p in source.items()}
        self._lent: dict[str, Tensor] = {}
        # Kept, in the CPU's memory, from the first move on.
        self._start: dict[str, Tensor] | None = None
        self.updates = self.last_update = 0
        self._prepare()

    def _prepare(self) -> None:
        """What a forward pass is given: the float32 weights themselves, or their copy in the policy's dtype."""
        for name, policy in self._policy.items():
            exact = self._exact[name] = self._exact[name].to(policy.device)
            if policy.dtype == torch.float32:
                self._lent[name] = exact
            elif name in self._lent and self._lent[name].device == policy.device:
                self._lent[name].copy_(exact)
            else:
                self._lent[name] = exact.to(policy.dtype)
        # A LoRA whose B is zero adds zero: the base model alone gives the same and costs less.
        self._is_base = all(
            ".lora_A." in name
            or ".lora_embedding_A." in name
            or ((".lora_B." in name or ".lora_embedding_B." in name) and not tensor.any())
            for name, tensor in self._exact.items()
        )

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model is the reference. Only for forward passes without gradients."""
        if self._is_base:
            assert isinstance(self._model, PeftModel)
            with _adapters_off(self._model):
                yield
            return
        with _exchanged(self._policy, self._lent):
            yield

    @contextmanager
    def at_start(self) -> Iterator[None]:
        """Inside, the model is what the reference started as."""
        start = {name: self._started()[name].to(policy) for name, policy in self._policy.items()}
        with _exchanged(self._policy, start):
            yield

    @property
    def moved(self) -> bool:
        """Whether the reference differs from its start."""
        return self._start is not None

    def _started(self) -> dict[str, Tensor]:
        return self._exact if self._start is None else self._start

    def _leave_start(self) -> None:
        if self._start is None:
            self._start = {name: tensor.to("cpu", copy=True) for name, tensor in self._exact.items()}

    def update(self, alpha: float, step: int) -> None:
        """reference <- alpha policy + (1 - alpha) reference."""
        if alpha > 0:
            self._leave_start()
        for name, policy in self._policy.items():
            mix_(self._exact[name], policy.to(self._exact[name].device), alpha)
        self.updates += 1
        self.last_update = step
        self._prepare()

    def weights(self) -> dict[str, Tensor]:
        """The float32 weights of the reference, by parameter name. Not copies."""
        return self._exact

    def distance(self) -> float:
        """Euclidean distance of the reference's weights from their start."""
        if self._start is None:
            return 0.0
        squares = [(self._exact[n].cpu().double() - s.double()).square().sum() for n, s in self._start.items()]
        return float(torch.stack(squares).sum().sqrt())

    def save(self, folder: str | Path, **about: Any) -> None:
        """Write the reference, the step of its last update and `about` into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.cpu() for name, tensor in self._exact.items()}, folder / WEIGHTS_FILE)
        state = {
            "format": FORMAT,
            "updates": self.updates,
            "last_update": self.last_update,
            "moved": self.moved,
            "start": self._start_digest(),
            **about,
        }
        write_atomically(folder / STATE_FILE, json.dumps(state, indent=2) + "\n")

    def load(self, folder: str | Path) -> dict[str, Any]:
        """Take over what `save` wrote; returns the content of its JSON.

        Raises:
            InputError: there is none, it is damaged, or it belongs to another model.
        """
        weights, state = read_saved(Path(folder))
        missing = {"updates", "moved", "start"} - state.keys()
        if missing:
            raise InputError(f"{str(Path(folder, STATE_FILE))!r} lacks {', '.join(sorted(missing))}")
        expected = {name: tuple(tensor.shape) for name, tensor in self._exact.items()}
        found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if expected != found:
            differing = next(n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n))
            raise InputError(
                f"the reference in {str(folder)!r} is of another model: {differing} is {found.get(differing, 'missing')}"
                f", here {expected.get(differing, 'missing')}"
            )
        if state["moved"]:
            self._leave_start()
        same_start = state["start"] == self._start_digest()
        for name, tensor in self._exact.items():
            tensor.copy_(weights[name])
        if not state["moved"]:
            self._start = None
        self.updates, self.last_update = state["updates"], state["last_update"]
        self._prepare()
        return {**state, "same_start": same_start}

    def _start_digest(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self._started().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()


def check_trainable(model: nn.Module) -> None:
    """Raise `InputError` unless the model is one whose reference can be kept: a LoRA on frozen weights, or, without an
    adapter, weights that are not quantised."""
    if isinstance(model, PeftModel):
        active = model.active_adapters
        if len(active) != 1:
            raise InputError(f"exactly one adapter must be active, got {', '.join(map(repr, active)) or 'none'}")
        config = model.peft_config[active[0]]
        if config.peft_type != "LORA":
            raise InputError(f"the adapter must be a LoRA, got {getattr(config.peft_type, 'value', config.peft_type)}")
        head = bare(model).get_output_embeddings()
        if not type(head).__module__.startswith("torch.nn"):
            raise InputError(
                f"the LM head must stay as it is: log-probabilities are computed from its weight, but the adapter "
                f"made it a {type(head).__name__}; take it out of target_modules and modules_to_save"
            )
    elif getattr(model, "is_quantized", False):
        raise InputError(
            "a model that is quantised cannot be trained as a whole: train an adapter on it (a peft_config, or lora_r above "
            "0), or load the model without quantization"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the model has no trainable weights; load its adapter with is_trainable=True")


def _matching(policy: dict[str, nn.Parameter], start: nn.Module) -> dict[str, Tensor]:
    given = dict(start.named_parameters())
    for name, parameter in policy.items():
        if name not in given or given[name].shape != parameter.shape:
            found = tuple(given[name].shape) if name in given else "missing"
            raise InputError(
                f"ref_model must be of the policy's shape: {name} is {found}, not {tuple(parameter.shape)}"
            )
    return {name: given[name] for name in policy}


@contextmanager
def _exchanged(policy: dict[str, nn.Parameter], weights: dict[str, Tensor]) -> Iterator[None]:
    own = {name: parameter.data for name, parameter in policy.items()}

    def put(tensors: dict[str, Tensor]) -> None:
        for name, parameter in policy.items():
            parameter.data = tensors[name]
        # Autocast keeps the weights it has cast, by parameter.
        torch.clear_autocast_cache()

    try:
        put(weights)
        yield
    finally:
        put(own)


@contextmanager
def _adapters_off(model: PeftModel) -> Iterator[None]:
    """Like `disable_adapter`, which also switches requires_grad of every weight: here only the layers' flag turns."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "_disable_adapters")]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer._disable_adapters = flag


def read_saved(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The reference's weights and its state in a checkpoint; `InputError` where they are missing or damaged."""
    for file in (WEIGHTS_FILE, STATE_FILE):
        if not (folder / file).is_file():
            raise InputError(f"checkpoint {str(folder)!r} has no {file}: it is none of this trainer's, or incomplete")
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
        if state["format"] != FORMAT:
            raise InputError(f"{folder / STATE_FILE} has format {state['format']!r}, this version reads {FORMAT}")
        if not isinstance(state["last_update"], int):
            raise InputError(f"{folder / STATE_FILE}: last_update must be a step, got {state['last_update']!r}")
        return weights, state
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the reference in {str(folder)!r} is damaged: {error}") from error
