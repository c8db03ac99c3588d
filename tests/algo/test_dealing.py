"""Who learns from which sample: every one once, in the order of the updates, on every rank alike."""

from __future__ import annotations

import numpy as np
import pytest

from r1zero.algo.dealing import Dealer, SampleTable
from r1zero.algo.parts import cut_parts
from r1zero.types import Batch, Group, Prompt, Sample


def make_groups(prompts, size, resting=()):
    """Groups of random lengths; those at the positions `resting` do not train."""
    random = np.random.default_rng(3)
    groups = []
    for position in range(prompts):
        prompt = Prompt(position, "", np.zeros(int(random.integers(1, 9)), np.int32), "")
        samples = []
        for _ in range(size):
            tokens = np.zeros(int(random.lognormal(3, 1)) + 1, np.int32)
            samples.append(Sample(tokens, np.zeros(len(tokens)), False, 0, reward=random.random()))
        groups.append(Group(position, prompt, samples, position not in resting))
    return groups


def deal(batch, groups, replicas):
    """All deals of a batch that comes in its parts."""
    dealer = Dealer(batch, replicas)
    deals = []
    for part in batch.parts:
        placed = [group for group in groups if group.position in part.positions]
        table = SampleTable.of(
            [group for group in placed if group.longest in part.lengths], batch.samples_per_prompt
        )
        deals.append(dealer.add(table))
    return deals


def make_batch(groups, minibatch, accumulates=False, blocks=1, edges=(10, 20, 40, 80)):
    size = len(groups[0].samples)
    parts = cut_parts(len(groups), blocks, edges)
    prompts = [group.prompt for group in groups]
    if accumulates:
        minibatch = len(groups) * size
    return Batch(1, 0, prompts, size, minibatch, 1, accumulates, parts)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("replicas", [1, 2, 5])
@pytest.mark.parametrize("minibatch", [8, 4, 6, 2, 48])
def test_minibatches_are_dealt_in_order_each_when_its_groups_are_known(minibatch, replicas, blocks):
    groups = make_groups(12, 4, resting=(3, 7))
    batch = make_batch(groups, minibatch, blocks=blocks)
    by_part = deal(batch, groups, replicas)
    deals = [found for part in by_part for found in part]
    assert [found.update for found in deals] == list(range(48 // minibatch))
    known = set()
    for part, found in zip(batch.parts, by_part, strict=True):
        for group in groups:
            if group.position in part.positions and group.longest in part.lengths:
                known.add(group.position)
        for one in found:
            assert {number // 4 for number in batch.samples_of(one.update)} <= known
    training = [n for n in range(48) if n // 4 not in (3, 7)]
    for one in deals:
        mine = [n for n in training if n in batch.samples_of(one.update)]
        assert one.numbers.tolist() == list(batch.samples_of(one.update))
        assert one.numbers[one.trains].tolist() == mine
        assert sorted(n for share in one.shares for n in share) == mine
        assert one.is_first and one.is_last
        lengths = [len(groups[n // 4].samples[n % 4].tokens) for n in one.numbers]
        assert one.counted.tolist() == lengths
    due = [position for one in deals for position in one.groups.positions.tolist()]
    assert due == list(range(12)), "the advantage of each group is due once"


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("replicas", [1, 2, 5])
def test_one_update_takes_each_part_as_it_comes(replicas, blocks):
    groups = make_groups(12, 4, resting=(3, 7))
    batch = make_batch(groups, None, accumulates=True, blocks=blocks)
    deals = [found for part in deal(batch, groups, replicas) for found in part]
    assert len(deals) > 2
    assert [one.is_first for one in deals] == [True] + [False] * (len(deals) - 1)
    assert [one.is_last for one in deals] == [False] * (len(deals) - 1) + [True]
    given = sorted(n for one in deals for share in one.shares for n in share)
    assert given == [n for n in range(48) if n // 4 not in (3, 7)]
    due = sorted(position for one in deals for position in one.groups.positions.tolist())
    assert due == list(range(12))


def test_replicas_stay_balanced_over_the_parts_of_an_update():
    """What one has more of in a part, the others get in the next: none is a sample above the mean."""
    groups = make_groups(60, 4)
    batch = make_batch(groups, None, accumulates=True)
    loads = np.zeros(4)
    for part in deal(batch, groups, 4):
        for one in part:
            for replica, share in enumerate(one.shares):
                loads[replica] += sum(len(groups[n // 4].samples[n % 4].tokens) for n in share)
    largest_group = max(sum(len(s.tokens) for s in group.samples) for group in groups)
    assert loads.max() - loads.mean() <= largest_group


def test_tables_join_by_position_and_give_rows_in_the_order_asked_for():
    groups = make_groups(6, 2)
    odd = SampleTable.of(groups[1::2], 2)
    joined = SampleTable.join([odd, SampleTable.of([], 2), SampleTable.of(groups[::2], 2)])
    assert joined.positions.tolist() == list(range(6))
    assert joined.rewards.tolist() == [group.rewards for group in groups]
    assert joined.scores.shape == (6, 2, 0), "nobody needs them"
    rows = joined.rows(np.array([4, 1]))
    assert rows.rewards.tolist() == [groups[4].rewards, groups[1].rewards]


def test_tables_hold_the_values_of_reward_functions_where_samples_have_them():
    groups = make_groups(4, 3)
    for group in groups:
        for member, sample in enumerate(group.samples):
            sample.score_values = np.array([group.position, member + 0.5])
            sample.right = member == 1
    tables = [SampleTable.of(part, 3) for part in ([], groups[2:], groups[:2])]
    joined = SampleTable.join(tables)
    assert joined.scores[:, :, 0].tolist() == [[n] * 3 for n in range(4)]
    assert joined.scores[:, :, 1].tolist() == [[0.5, 1.5, 2.5]] * 4
    assert joined.right.tolist() == [[False, True, False]] * 4


# -- the pool -------------------------------------------------------------------------------------

# E8: groups of four, two of them in an update, four in the pool; right answers by position.
RIGHT = [4, 2, 0, 1, 3, 4, 1, 2]


def pooled(kept, pool, minibatch, rounds, accumulates=False, seed=0):
    """The positions of each deal of a pool whose groups come in a random order, round by round.

    `rounds` are sizes; the last one is the last that may be drawn.
    """
    chance = np.random.default_rng(seed)
    drawn = sum(rounds)
    groups = make_groups(drawn, 4, resting=[p for p in range(drawn) if p not in kept])
    prompts = [group.prompt for group in groups]
    dealer = None
    deals = []
    first = 0
    for number, size in enumerate(rounds):
        batch = Batch(
            1,
            0,
            prompts[: first + size],
            4,
            (pool if accumulates else minibatch) * 4,
            accumulates=accumulates,
            pool=pool,
            first=first,
            round=number + 1,
            most_rounds=len(rounds),
        )
        assert batch.everything.positions == range(first, first + size)
        assert batch.num_samples == pool * 4
        if dealer is None:
            dealer = Dealer(batch, 2)
        dealer.go_on(batch)
        unknown = chance.permutation(np.arange(first, first + size))
        while len(unknown):
            count = int(chance.integers(0, len(unknown) + 1))
            table = SampleTable.of([groups[p] for p in sorted(unknown[:count])], 4)
            unknown = unknown[count:]
            deals += dealer.add(table)
        first += size
    return deals


def positions_of(found):
    assert found.trains.all() and sorted(n for share in found.shares for n in share) == sorted(
        found.numbers.tolist()
    )
    assert (found.numbers.reshape(-1, 4)[:, 0] // 4).tolist() == found.groups.positions.tolist()
    return found.groups.positions.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_the_first_kept_groups_by_position_train_whatever_comes_first(seed):
    kept = [position for position, right in enumerate(RIGHT) if 0 < right < 4]
    deals = pooled(kept, 4, 2, [4, 4], seed=seed)
    assert [positions_of(found) for found in deals] == [[1, 3], [4, 6]]
    assert [(found.update, found.is_first, found.is_last) for found in deals] == [
        (0, True, True),
        (1, True, True),
    ]


@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_a_pool_of_any_size_takes_the_first_and_at_the_end_what_there_is(seed, accumulates):
    chance = np.random.default_rng(100 + seed)
    rounds = [int(size) for size in chance.integers(1, 7, chance.integers(1, 4))]
    drawn = sum(rounds)
    kept = [p for p in range(drawn) if chance.random() < 0.5]
    minibatch = int(chance.integers(1, 4))
    pool = minibatch * int(chance.integers(1, 4))
    # as many rounds as are needed, of those that may be
    while len(rounds) > 1 and sum(p < sum(rounds[:-1]) for p in kept) >= pool:
        rounds.pop()
    kept = [p for p in kept if p < sum(rounds)]
    deals = pooled(kept, pool, minibatch, rounds, accumulates, seed)
    first = kept[:pool]
    dealt = [positions_of(found) for found in deals]
    if accumulates:
        assert sorted(position for positions in dealt for position in positions) == first
        assert [found.is_first for found in deals] == [True] * bool(first) + [False] * (
            len(deals) - 1
        )
        assert [found.is_last for found in deals] == [False] * (len(deals) - 1) + [True] * bool(
            first
        )
    else:
        assert dealt == [first[i : i + minibatch] for i in range(0, len(first), minibatch)]
        assert all(found.is_first and found.is_last for found in deals)


def test_a_group_is_accumulated_once_it_is_sure_to_train():
    groups = make_groups(5, 4, resting=(0,))
    batch = Batch(1, 0, [group.prompt for group in groups], 4, 8, accumulates=True, pool=2)
    dealer = Dealer(batch, 1)

    def come(*positions):
        found = dealer.add(SampleTable.of([groups[p] for p in positions], 4))
        return [(positions_of(one), one.is_first, one.is_last) for one in found]

    assert come(3) == []  # three before it may be kept
    assert come(1) == [([1], True, False)]  # at most one before it
    assert come(0, 4) == []  # 3 still waits for 2
    assert come(2) == [([2], False, True)], "and 3 is left over"
