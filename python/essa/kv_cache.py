"""KV caches of transformers that grow in place: a new token is written beside the others, where transformers copies all."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64  # positions: copying a cache that often costs little beside reading it at every token


def grow_in_place(cache: Any, most: int) -> None:
    """Give the layers of a KV cache room for what comes.

    Layers of other kinds than transformers' two dynamic ones are left alone. Not for training: what was returned before
    is a view of what is written to. Under `torch.inference_mode` it grows under that alone.

    Args:
        cache: a transformers cache that holds a prompt.
        most: how many positions it will come to hold; what is beyond them is copied token by token.
    """
    layers = getattr(cache, "layers", [])
    for i, layer in enumerate(layers):
        growing: Any = None
        if type(layer) is DynamicLayer and layer.keys is not None:
            growing = _GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer and layer.keys is not None:
            growing = _GrowingWindow(layer.sliding_window)
        if growing is not None:
            growing.__dict__.update(layer.__dict__, key_room=_Room(most), value_room=_Room(most))
            layers[i] = growing


class _Room:
    """A buffer [rows, heads, positions, d] whose last positions may be free."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.leave()

    def leave(self) -> None:
        self.buffer: Tensor | None = None
        self.kept: Tensor | None = None
        self.end = 0

    def append(self, kept: Tensor, more: Tensor) -> Tensor:
        """``kept``, which may be what `keep` was given, and ``more`` behind it, as part of the buffer."""
        length, added = kept.shape[-2], more.shape[-2]
        if self.buffer is None or kept is not self.kept or self.end + added > self.buffer.shape[-2]:
            room = length + added + min(ROOM, max(self.most - length - added, 0))
            self.buffer = kept.new_empty(*kept.shape[:-2], room, kept.shape[-1])
            self.buffer[..., :length, :] = kept
            self.end = length
        self.buffer[..., self.end : self.end + added, :] = more
        self.end += added
        return self.buffer[..., self.end - added - length : self.end, :]

    def keep(self, part: Tensor) -> Tensor:
        """The last positions that were appended, to be appended to."""
        self.kept = part
        return part


class _Growing(DynamicLayer):
    key_room: _Room
    value_room: _Room

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.key_room.leave()  # at once: the other layers' rows are yet to be copied
        self.value_room.leave()


class _GrowingLayer(_Growing):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self.key_room.keep(self.key_room.append(self.keys, key_states))
        self.values = self.value_room.keep(self.value_room.append(self.values, value_states))
        return self.keys, self.values


class _GrowingWindow(_Growing, DynamicSlidingWindowLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None or getattr(self, "record_past", False):
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        keys = self.key_room.append(self.keys, key_states)
        values = self.value_room.append(self.values, value_states)
        first = -self.sliding_window + 1
        self.keys = self.key_room.keep(keys[:, :, first:])
        self.values = self.value_room.keep(values[:, :, first:])
        return keys, values
