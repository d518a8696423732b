"""Caches that grow in place hold what transformers' own do, and do not copy it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from essa.kv_cache import ROOM, grow_in_place
from transformers import DynamicCache, LlamaConfig, MistralConfig

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
CONFIGS = {
    "all": LlamaConfig(**SIZES),
    "window": MistralConfig(**SIZES, sliding_window=9),
    "window of one": MistralConfig(**SIZES, sliding_window=1),
}


def caches(config, length, rows=3, most=1000):
    """A cache as transformers has it and one that grows, both with a prompt."""
    states = [torch.randn(2, rows, 2, length, 8) for _ in range(2)]
    pair = []
    for _ in range(2):
        cache = DynamicCache(config=config)
        for layer, (key, value) in enumerate(states):
            cache.update(key, value, layer)
        pair.append(cache)
    grow_in_place(pair[1], most)
    return pair


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 5, 30])
def test_what_is_returned_and_kept_is_the_same(name, length, seed):
    plain, growing = caches(CONFIGS[name], length)
    for step in range(2 * ROOM + 5):
        more = torch.randn(2, len(plain.layers[0].keys), 2, 3 if step == 7 else 1, 8)
        for layer in range(2):
            for expected, got in zip(plain.update(*more, layer), growing.update(*more, layer), strict=True):
                assert torch.equal(got, expected)
            assert torch.equal(growing.layers[layer].keys, plain.layers[layer].keys)
            assert torch.equal(growing.layers[layer].values, plain.layers[layer].values)
        assert growing.get_seq_length() == plain.get_seq_length()
        if step in (20, 90):
            rows = torch.tensor([0, 2] if step == 20 else [1])
            plain.reorder_cache(rows)
            growing.reorder_cache(rows)


@pytest.mark.parametrize("name", ["all", "window"])
def test_a_token_does_not_move_the_others(name, seed):
    _, growing = caches(CONFIGS[name], 5)
    places = set()
    for _ in range(ROOM):
        growing.update(*torch.randn(2, 3, 2, 1, 8), 0)
        places.add(growing.layers[0].keys.untyped_storage().data_ptr())
    assert len(places) == 1
    growing.update(*torch.randn(2, 3, 2, ROOM, 8), 0)
    assert growing.layers[0].keys.untyped_storage().data_ptr() not in places


def test_no_more_room_than_is_needed(seed):
    _, growing = caches(CONFIGS["all"], 5, most=8)
    for length, room in [(6, 8), (7, 8), (8, 8), (9, 9)]:
        growing.update(*torch.randn(2, 3, 2, 1, 8), 0)
        assert growing.layers[0].keys.shape[-2] == length
        assert growing.layers[0].keys.untyped_storage().nbytes() == 4 * 3 * 2 * room * 8


def test_what_was_returned_before_is_not_written_to(seed):
    """Positions that are taken back and written anew are not those of the buffer."""
    _, growing = caches(CONFIGS["all"], 5)
    before, _ = growing.update(*torch.randn(2, 3, 2, 1, 8), 0)
    kept = before.clone()
    growing.layers[0].crop(-1)
    growing.update(*torch.randn(2, 3, 2, 1, 8), 0)
    assert growing.layers[0].keys.shape == before.shape
    assert torch.equal(before, kept)


def test_rows_that_leave_take_their_memory_along(seed):
    _, growing = caches(CONFIGS["all"], 5)
    growing.update(*torch.randn(2, 3, 2, 1, 8), 0)
    old = weakref.ref(growing.layers[0].key_room.buffer)
    growing.reorder_cache(torch.tensor([2, 1]))
    gc.collect()
    assert old() is None
    assert growing.layers[0].keys.untyped_storage().nbytes() == 4 * 2 * 2 * 6 * 8


@pytest.mark.parametrize("name", ["all", "window"])
def test_a_cache_that_starts_again(name, seed):
    plain, growing = caches(CONFIGS[name], 5)
    for cache in (plain, growing):
        cache.update(*torch.ones(2, 3, 2, 1, 8), 0)
        cache.reset()
    more = torch.randn(2, 3, 2, 2, 8)
    for _ in range(3):
        for expected, got in zip(plain.update(*more, 0), growing.update(*more, 0), strict=True):
            assert torch.equal(got, expected)
    assert growing.get_seq_length() == plain.get_seq_length()


def test_a_window_that_records_its_past(seed):
    plain, growing = caches(CONFIGS["window"], 12)
    if not hasattr(plain.layers[0], "activate_past_recording"):
        pytest.skip("this transformers does not record")
    for step in range(6):
        more = torch.randn(2, 3, 2, 1, 8)
        for cache in (plain, growing):
            if step == 2:
                cache.layers[0].activate_past_recording()
            cache.update(*more, 0)
            if step == 4:
                cache.layers[0].crop(-2)
        assert torch.equal(growing.layers[0].keys, plain.layers[0].keys)


def test_other_layers_are_left_alone():
    class Own(type(DynamicCache(config=CONFIGS["all"]).layers[0])):
        pass

    cache = DynamicCache(config=CONFIGS["all"])
    cache.update(*torch.randn(2, 3, 2, 1, 8), 0)
    empty = cache.layers[1]
    cache.layers.append(Own())
    grow_in_place(cache, 10)
    assert type(cache.layers[0]) is not type(empty)
    assert cache.layers[1] is empty
    assert type(cache.layers[2]) is Own
    grow_in_place(object(), 10)
