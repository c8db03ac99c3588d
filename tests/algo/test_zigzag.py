"""Zigzag sharding: every token on one rank, even work, and attention that is that of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.items import item

from r1zero.algo import zigzag
from r1zero.algo.packing import pack
from r1zero.algo.zigzag import deal, shard
from r1zero.ops.attention import packed_causal_attention

CPU = torch.device("cpu")


def packed(*groups):
    """A microbatch of groups (prompt, responses), given as lengths; all its tokens differ."""
    ids = iter(range(10**6))
    items = []
    for position, (prompt_length, response_lengths) in enumerate(groups):
        prompt = [next(ids) for _ in range(prompt_length)]
        for length in response_lengths:
            response = [next(ids) for _ in range(length)]
            items.append(item(len(items), position, prompt, response))
    return pack(items, CPU)


def parts_of(batch, ranks, multiple_of=1):
    return [shard(batch, ranks, rank, multiple_of, CPU) for rank in range(ranks)]


def places_of(batch, part):
    """Where the tokens of a part lie in the microbatch."""
    by_token = {token: place for place, token in enumerate(batch.tokens.tolist())}
    return [by_token[token] for token in part.tokens.tolist()]


def count(pieces):
    return sum(len(piece.queries) for piece in pieces)


def test_the_drawing_at_the_top(monkeypatch):
    monkeypatch.setattr(zigzag, "SMALLEST_CHUNK", 4)
    batch = packed((16, [1]))
    first, second = parts_of(batch, 2)
    assert first.tokens.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert second.tokens.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert first.segments.cu_seqlens_q == [4, 8] and first.segments.cu_seqlens_k == [4, 20]
    last_chunk = [*range(4), *range(8, 16), *range(4, 8)]
    assert first.segments.key_rows.tolist() == [0, 1, 2, 3, *last_chunk]
    pairs = [sum(piece.pairs for piece in pieces) for pieces in deal(batch.segments, 2)]
    assert pairs == [68, 68]


# Some segments are cut, others go whole.
GROUPS = [(30, [45, 9, 70]), (2, [1, 33]), (50, [3, 100])]


@pytest.mark.parametrize(("ranks", "multiple_of"), [(2, 1), (3, 4), (4, 2), (40, 1)])
@pytest.mark.parametrize("smallest", [1, 7, 64])
def test_attention_of_the_parts_is_that_of_the_whole(monkeypatch, ranks, multiple_of, smallest):
    monkeypatch.setattr(zigzag, "SMALLEST_CHUNK", smallest)
    batch = packed(*GROUPS)
    torch.manual_seed(0)
    query, key, value = (torch.randn(len(batch.tokens), heads, 8) for heads in (4, 2, 2))
    expected = packed_causal_attention(query, key, value, batch.segments, 0.3)
    parts = parts_of(batch, ranks, multiple_of)
    places = [places_of(batch, part) for part in parts]
    gathered = [place for of_part in places for place in of_part]
    seen = []
    for part, of_part, pieces in zip(parts, places, deal(batch.segments, ranks), strict=True):
        found = packed_causal_attention(
            query[of_part], key[gathered], value[gathered], part.segments, 0.3
        )
        own = of_part[: count(pieces)]  # the others fill the part up
        torch.testing.assert_close(found[: len(own)], expected[own], rtol=0, atol=1e-6)
        assert torch.equal(part.positions, batch.positions[of_part])
        assert len(part.tokens) == len(parts[0].tokens) and len(of_part) % multiple_of == 0
        seen += own
    assert sorted(seen) == list(range(len(batch.tokens)))


@pytest.mark.parametrize("ranks", [2, 3, 40])
def test_every_response_token_is_predicted_once(monkeypatch, ranks):
    monkeypatch.setattr(zigzag, "SMALLEST_CHUNK", 3)
    batch = packed(*GROUPS)
    predicted = []
    for part in parts_of(batch, ranks):
        outputs = batch.tokens[batch.logit_positions[part.own_rows]]
        assert torch.equal(part.tokens[part.logit_positions], outputs)
        assert torch.equal(part.own_targets, batch.targets[part.own_rows])
        assert torch.equal(part.targets, batch.targets), "the loss is that of all of them"
        predicted += part.own_rows.tolist()
    assert sorted(predicted) == list(range(len(batch.targets)))


LONG = np.random.default_rng(0).integers(1000, 8000, 7)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(
    "groups", [[(500, [8192])], [(1, [32768])], [(700, LONG)], [(90, LONG), (300, [40] * 9)]]
)
def test_ranks_have_even_work_and_few_tokens_to_fill(ranks, groups):
    batch = packed(*groups)
    dealt = deal(batch.segments, ranks)
    pairs = [sum(piece.pairs for piece in pieces) for pieces in dealt]
    assert max(pairs) < 1.05 * np.mean(pairs)
    tokens = [count(pieces) for pieces in dealt]
    assert max(tokens) - min(tokens) <= len(groups) * len(LONG)  # rounding of chunks


def test_short_segments_fill_ranks_up_and_are_whole_but_for_one_a_rank():
    batch = packed((100, [41, 31, 301, 61]))
    dealt = deal(batch.segments, 2)
    lengths = [[len(piece.queries) for piece in pieces] for pieces in dealt]
    assert lengths == [[75, 75, 100, 15], [75, 75, 25, 30, 60]]


def test_a_microbatch_of_one_token_fills_all_ranks():
    first, second = parts_of(packed((1, [1])), 2, multiple_of=2)
    assert first.tokens.tolist() == second.tokens.tolist() == [0, 0]
    assert first.own_rows.tolist() == [0] and second.own_rows.tolist() == []
