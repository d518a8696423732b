"""GPUs that are not there: tensors in the CPU's memory that say they are on one, and may not meet those of another.

The ops' own checks and everything between them run as on real GPUs, down to the implementation, which is the CPU's.
"""

from __future__ import annotations

import contextlib

import essa.models
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import essa_kernels.dispatch
import essa_kernels.gpu
import essa_kernels.nn.model_weights

if torch.cuda.is_available():
    pytest.skip("the GPUs are real here", allow_module_level=True)

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
READS = ("__bool__", "__int__", "__float__", "nonzero", "tolist")
READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
WAITS: list[str] = []
"""What has made the CPU wait for a GPU so far."""


class OnGPU(Tensor):
    """A tensor ``inner`` of the CPU that says it is on ``device``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner, device):
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(device),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})

    def __repr__(self):
        return f"OnGPU({self.inner}, {self.device})"


def method(name, *, moves=False):
    """A method of tensors that asks for a driver before it is dispatched."""

    def call(self, *args, **kwargs):
        if not moves:
            meet(name, self.device, tree_leaves((args, kwargs)))
        if name in READS or (moves and not isinstance(args[0], OnGPU)):
            WAITS.append(name)
        result = getattr(self.inner, name)(*inside(args), **inside(kwargs))
        return self if result is self.inner else tree_map_only(Tensor, lambda t: OnGPU(t, self.device), result)

    return call


for name in ("getitem", "setitem", "bool", "int", "float", "invert"):
    setattr(OnGPU, f"__{name}__", method(f"__{name}__"))
for name in ("contiguous", "nonzero", "tolist", "data_ptr", "untyped_storage"):
    setattr(OnGPU, name, method(name))
OnGPU.copy_ = method("copy_", moves=True)


def inside(tree):
    return tree_map_only(OnGPU, lambda tensor: tensor.inner, tree)


def meet(what, device, values):
    """What is on a GPU meets what is there too; of the CPU's, single numbers and indices alone."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    wrong = [str(t.device) for t in tensors if t.device != device and (isinstance(t, OnGPU) or t.dim())]
    assert not wrong or (what == "__getitem__" and set(wrong) == {"cpu"}), f"{what} on {device}: tensors on {wrong}"


def compute(op, args, kwargs):
    with Dispatched():
        # In inference mode, ops that are made of others arrive whole.
        parts = op.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if op.namespace == "essa":
            return op.redispatch(CUDA, *args, **kwargs)
    on_gpus = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnGPU)]
    device = kwargs.get("device")
    if device is not None:
        kwargs = {**kwargs, "device": "cpu"}
    elif on_gpus and op in MOVES:
        device = args[0].device
    elif on_gpus:
        device = on_gpus[0].device
        meet(op, device, tree_leaves((args, kwargs)))
    result = op(*inside(args), **inside(kwargs))
    on_cpu = device is None or torch.device(device).type == "cpu"
    crosses = op in MOVES and on_cpu is bool(on_gpus) and not kwargs.get("non_blocking")
    if crosses or (on_gpus and READING_TAGS & set(op.tags)):
        WAITS.append(str(op))
    if on_cpu:
        return result
    given = {id(tensor.inner): tensor for tensor in on_gpus}
    return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else OnGPU(t, device), result)


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return compute(op, args, kwargs or {})


@contextlib.contextmanager
def pretended(monkeypatch):
    """Inside, tensors can be made on, and moved to, as many GPUs as one likes."""
    resolve, tensor = essa_kernels.dispatch.resolve, torch.tensor

    def on_cpu(op, device, backend, *more):
        def run(*args):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            meet(op, tensors[0].device, tensors)
            resolve(op, torch.device("cpu"), None)(*inside(args))

        return run

    def there(data, *, device=None, **options):
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    def type_of(value):
        return Tensor if isinstance(value, OnGPU) else type(value)

    monkeypatch.setattr(essa_kernels.dispatch, "resolve", on_cpu)
    monkeypatch.setattr(essa_kernels.dispatch, "unavailable", lambda *_: None)
    monkeypatch.setattr(essa_kernels.gpu, "architecture", lambda device: "sm_90")
    for module in (essa.models, essa_kernels.nn.model_weights):  # they tell plain tensors from quantised ones
        monkeypatch.setattr(module, "type", type_of, raising=False)
    monkeypatch.setattr(torch, "tensor", there)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Dispatched():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
