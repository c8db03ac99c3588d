"""RecordedRoutes as flat buffers: what comes out is what went in, without a copy, and nothing but that."""

from __future__ import annotations

import numpy as np

from r1zero.distributed.route_wire import pack_routes, unpack_routes
from r1zero.types import RecordedRoutes

LAYERS, TOP_K = 2, 4


def ids(tokens: int) -> np.ndarray:
    """Expert ids of so many tokens, uint8 [tokens, layers, k]."""
    random = np.random.default_rng(tokens)
    return random.integers(0, 256, (tokens, LAYERS, TOP_K), dtype=np.uint8)


def test_routes_come_out_as_they_went_in():
    given = RecordedRoutes(
        prompts={7: ids(5), 2: ids(1)}, samples={14: ids(2), 15: ids(0), 4: ids(9)}
    )
    buffer = pack_routes(given)
    assert buffer.numel() == 4 * 8 + 5 * 16 + (5 + 1 + 2 + 0 + 9) * LAYERS * TOP_K
    found = unpack_routes(buffer)
    for mine, theirs in ((found.prompts, given.prompts), (found.samples, given.samples)):
        assert list(mine) == list(theirs), "in order"
        for number, array in mine.items():
            assert array.dtype == np.uint8 and array.shape == theirs[number].shape
            assert np.array_equal(array, theirs[number])
            assert not array.size or np.shares_memory(array, buffer.numpy())


def test_the_example_of_the_module():
    one_prompt = RecordedRoutes(prompts={0: ids(5)}, samples={0: ids(2), 1: ids(0)})
    assert pack_routes(one_prompt).numel() == 4 * 8 + 16 + 2 * 16 + (5 + 2) * 2 * 4


def test_no_routes_are_a_message_too():
    found = unpack_routes(pack_routes(RecordedRoutes()))
    assert found == RecordedRoutes()


def test_routes_may_lie_as_they_like():
    """A layer's ids of all tokens may lie together at the engine."""
    by_layer = np.ascontiguousarray(ids(6).transpose(1, 0, 2))
    given = by_layer.transpose(1, 0, 2)
    assert not given.flags.c_contiguous
    [found] = unpack_routes(pack_routes(RecordedRoutes(samples={3: given}))).samples.values()
    assert np.array_equal(found, ids(6))
