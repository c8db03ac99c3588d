"""Packing: what each token sees, and that nothing is lost or doubled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.items import item, random_items
from torch.nn.functional import scaled_dot_product_attention

from r1zero.algo.packing import (
    WholeSample,
    balance_over_replicas,
    cut_microbatches,
    num_tokens,
    pack,
)
from r1zero.ops.attention import packed_causal_attention
from r1zero.types import Batch

CPU = torch.device("cpu")


def test_the_example_of_the_docstring():
    batch = pack([item(0, 0, [7, 8], [1, 2, 3]), item(1, 0, [7, 8], [4, 5])], CPU)
    assert batch.tokens.tolist() == [7, 8, 1, 2, 4] and batch.positions.tolist() == [0, 1, 2, 3, 2]
    assert batch.logit_positions.tolist() == [1, 2, 3, 1, 4] and batch.targets.tolist() == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert batch.response_cu_seqlens == [0, 3, 5]
    assert batch.per_token([0.5, 2.0]).tolist() == [0.5, 0.5, 0.5, 2.0, 2.0]
    joined = batch.concat([np.array([1, 2, 3.0]), np.array([4, 5.0])])
    assert [part.tolist() for part in batch.split(joined)] == [[1, 2, 3], [4, 5]]


def whole(made):
    """The same to be read to its end."""
    return WholeSample(made.number, made.position, made.prompt, made.sample)


def test_whole_samples_keep_their_last_tokens_and_share_their_prompt():
    items = [whole(item(0, 0, [7, 8], [1, 2, 3])), whole(item(1, 0, [7, 8], [4, 5]))]
    batch = pack(items, CPU)
    assert batch.tokens.tolist() == [7, 8, 1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 2, 3]
    assert batch.logit_positions.tolist() == [2, 3, 4, 5, 6]
    assert batch.tokens[batch.logit_positions].tolist() == batch.targets.tolist()
    assert batch.response_cu_seqlens == [0, 3, 5]
    assert num_tokens(items) == len(batch.tokens)
    assert cut_microbatches(items, 9, max_tokens=7) == [items]
    assert cut_microbatches(items, 9, max_tokens=6) == [items[:1], items[1:]]


def test_filling_up_adds_a_segment_that_nobody_sees():
    batch = pack([item(0, 0, [7, 8], [1, 2, 3])], CPU, multiple_of=4)
    assert len(batch.tokens) == 4 and batch.segments.cu_seqlens_q == [2, 4]
    batch = pack([item(0, 0, [7, 8], [1, 2, 3, 4])], CPU, multiple_of=4)
    assert len(batch.tokens) == 8 and batch.segments.cu_seqlens_q == [2, 5, 8]


@pytest.mark.parametrize("multiple_of", [1, 4])
def test_without_items_there_is_filler_and_nothing_to_predict(multiple_of):
    batch = pack([], CPU, multiple_of)
    assert batch.tokens.tolist() == [0] * multiple_of
    assert batch.segments.cu_seqlens_q == [multiple_of]
    assert batch.logit_positions.tolist() == batch.targets.tolist() == []


def with_routes(number, prompt, response):
    """An item that says where its tokens went: ids that tell the number of the item and the token."""
    made = item(number, 0, prompt, response)
    made.sample.routes = np.full((len(response) - 1, 2, 1), 10 + number, np.uint8)
    return replace(made, prompt_routes=np.arange(2 * len(prompt), dtype=np.uint8).reshape(-1, 2, 1))


def test_routes_lie_as_their_tokens_do_and_fillers_go_where_the_first_ones_go():
    items = [with_routes(0, [7, 8], [1, 2, 3]), with_routes(1, [7, 8], [4, 5])]
    batch = pack(items, CPU)
    assert batch.routes.dtype == torch.uint8 and batch.routes.shape == (5, 2, 1)
    assert batch.routes[:, :, 0].tolist() == [[0, 1], [2, 3], [10, 10], [10, 10], [11, 11]]
    filled = pack(items, CPU, multiple_of=4)
    assert torch.equal(filled.routes, batch.routes[[0, 1, 2, 3, 4, 0, 1, 2]])
    of_one_token = pack([with_routes(0, [7], [1])], CPU, multiple_of=3)
    assert of_one_token.routes[:, :, 0].tolist() == [[0, 1]] * 3
    free = [items[0], items[1].without_routes()]
    assert pack(free, CPU).routes is None, "all routers choose, or none does"
    assert pack(random_items(), CPU).routes is None


def test_predictions_are_counted_at_the_tokens_that_they_are_made_from():
    items = [item(0, 0, [7, 8], [1, 2, 3]), item(1, 0, [7, 8], [4, 5])]
    assert pack(items, CPU).predictions().tolist() == [0, 2, 1, 1, 1]
    items[0].sample.loss_mask = np.array([False, True, False])
    assert pack(items, CPU, multiple_of=4).predictions().tolist() == [0, 1, 1, 0, 1, 0, 0, 0]


def test_attention_in_a_pack_equals_each_sequence_alone():
    items = random_items()
    batch = pack(items, CPU)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(len(batch.tokens), 4, 8),
        torch.randn(len(batch.tokens), 2, 8),
        torch.randn(len(batch.tokens), 2, 8),
    )
    found = packed_causal_attention(query, key, value, batch.segments, 0.3)
    first = 0
    for position in range(3):
        group = [i for i in items if i.position == position]
        length = len(group[0].prompt.tokens)
        prompt, first = list(range(first, first + length)), first + length
        for member in group:
            rows = prompt + list(range(first, first + member.own_tokens))
            first += member.own_tokens
            q, k, v = (x[rows].transpose(0, 1)[None] for x in (query, key, value))
            alone = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=0.3, enable_gqa=True
            )[0].transpose(0, 1)
            torch.testing.assert_close(found[rows], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("max_samples", "max_tokens"), [(1, None), (4, None), (9, None), (1, 16), (1, 30), (1, 1000)]
)
def test_microbatches_hold_every_item_once_within_their_bounds(max_samples, max_tokens):
    items = random_items()
    cut = cut_microbatches(items, max_samples, max_tokens)
    assert sorted(i.number for part in cut for i in part) == list(range(9))
    for part in cut:
        if max_tokens is None:
            assert len(part) <= max_samples
        else:
            assert len(pack(part, CPU).tokens) <= max_tokens or len(part) == 1


@pytest.mark.parametrize("replicas", [1, 2, 3, 5, 9, 12])
def test_shares_hold_every_item_once_and_are_balanced(replicas):
    items = random_items()
    shares = balance_over_replicas(items, [0] * replicas)
    assert sorted(i.number for share in shares for i in share) == list(range(9))
    assert all(shares) or replicas > 9
    if replicas == 2:
        loads = [len(pack(share, CPU).tokens) for share in shares]
        assert max(loads) <= 4 / 3 * sum(loads) / 2 + max(num_tokens([i]) for i in items)


def test_a_share_makes_up_for_what_a_replica_has_already():
    items = random_items()
    loads = [0, 10**6, 0]
    first, second, third = balance_over_replicas(items, loads)
    assert second == [] and first and third
    assert loads[0] == len(pack(first, CPU).tokens) and loads[1] == 10**6


@pytest.mark.parametrize(("group", "minibatch"), [(4, 8), (4, 4), (4, 2), (4, 1), (4, 6), (3, 4)])
def test_every_group_arrives_once_and_before_it_is_needed(group, minibatch):
    batch = Batch(1, 0, [None] * 12, group, minibatch)
    arrived: list[int] = []
    for m in range(batch.num_minibatches):
        arrived += batch.arrivals(m)
        assert {s // group for s in batch.samples_of(m)} <= set(arrived)
    assert arrived == list(range(12))
