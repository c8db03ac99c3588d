"""Index tables of paged attention by block: which query meets which block, and who reads the result.

Three samples a, b (of one prompt) and c in a pool of six blocks. Both prompts fill one block, which
the group shares; own blocks lie at the high end:

    block        0     1     2    3    4    5
    in use by   a b    c     -    c    b    a         shared: [0, 2)   own: [3, 6)

A sample's use of a block is an entry. The table of entries says in which row of all that blocks
find the sample's stands, block by block of its sequence (W of them at most). With one head:

    found by     own blocks    |  shared blocks, the members of a group side by side  |  nothing
                 3    4    5   |  0 by a   0 by b   1 by c   1 by nobody              |
    row          0    1    2   |  3        4        5        6                        |  7

    entries      a: 3 2    b: 4 1    c: 5 0

Where a sample has less than W blocks, its entry is `nothing`: a row of zeros. With K kv heads of m
query heads, each block finds a row for each kv head, member and query head, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r1zero.rollout.kv_cache import SampleBlocks


@dataclass(frozen=True, slots=True)
class BlockTables:
    """Numbers of rows, int64, in flat [rows, x] views: so a rearrangement is one copy of rows.

    Queries are rows [n * heads]; weights, those of the softmax, are rows [n * heads * W]. The
    example above:

    >>> a = SampleBlocks(position=0, shared=[0], own=[5])
    >>> b = SampleBlocks(position=0, shared=[0], own=[4])
    >>> c = SampleBlocks(position=1, shared=[1], own=[3])
    >>> tables = block_tables([a, b, c], 6, 3, 2, group_size=2, kv_heads=1, heads=1)
    >>> tables.entries.reshape(3, 2).tolist()
    [[3, 2], [4, 1], [5, 0]]

    Block 3 meets the query of c, 4 that of b, 5 that of a; each is its sample's second block:

    >>> tables.own_queries.flatten().tolist(), tables.own_weights.flatten().tolist()
    ([2, 1, 0], [5, 3, 1])

    Block 0 meets the queries of a and b, block 1 that of c. What nobody uses works for sample 0,
    and nobody reads what it finds:

    >>> tables.shared_queries.reshape(2, 2).tolist(), tables.shared_weights.reshape(2, 2).tolist()
    ([[0, 1], [2, 0]], [[0, 2], [4, 0]])
    """

    own_queries: np.ndarray  # [own blocks, K, m]: the query that meets the block
    own_weights: np.ndarray  # [own blocks, K, m]: the weights that meet it, those of this entry
    shared_queries: np.ndarray  # [shared blocks, K, G, m]
    shared_weights: np.ndarray  # [shared blocks, K, G, m]
    entries: np.ndarray  # [n, K, m, W]: the rows that blocks found


def block_tables(
    rows: Sequence[SampleBlocks],
    num_blocks: int,
    own_start: int,
    shared_range: int,
    group_size: int,
    kv_heads: int,
    heads: int,
) -> BlockTables:
    """The tables for n running samples whose blocks lie in [own_start, num_blocks) and [0,
    shared_range)."""
    per_kv_head = heads // kv_heads
    num_own = num_blocks - own_start
    width = max(len(row.shared) + len(row.own) for row in rows)

    # The number of the sample that uses a block, and as which of its W blocks.
    user_of_own = np.zeros(num_own, np.int64)
    place_of_own = np.zeros(num_own, np.int64)
    user_of_shared = np.zeros((shared_range, group_size), np.int64)
    place_of_shared = np.zeros((shared_range, group_size), np.int64)

    # The rows that blocks find, counted through.
    own_rows = num_own * heads
    shared_rows = shared_range * group_size * heads
    found_by_own = np.arange(own_rows).reshape(num_own, kv_heads, per_kv_head)
    shared_shape = (shared_range, kv_heads, group_size, per_kv_head)
    found_by_shared = np.arange(own_rows, own_rows + shared_rows).reshape(shared_shape)
    nothing = own_rows + shared_rows
    entries = np.full((len(rows), kv_heads, per_kv_head, width), nothing)

    num_members: dict[int, int] = {}
    for number, row in enumerate(rows):
        member = num_members.get(row.position, 0)
        num_members[row.position] = member + 1
        own = np.asarray(row.own) - own_start
        first_own = len(row.shared)
        end = first_own + len(row.own)
        user_of_shared[row.shared, member] = number
        place_of_shared[row.shared, member] = np.arange(first_own)
        user_of_own[own] = number
        place_of_own[own] = np.arange(first_own, end)
        shared_entries = found_by_shared[row.shared, :, member]  # [blocks, K, m]
        entries[number, ..., :first_own] = np.moveaxis(shared_entries, 0, -1)
        entries[number, ..., first_own:end] = np.moveaxis(found_by_own[own], 0, -1)

    head = np.arange(heads).reshape(kv_heads, per_kv_head)
    own_queries = user_of_own[:, None, None] * heads + head
    shared_queries = user_of_shared[:, None, :, None] * heads + head[:, None]
    return BlockTables(
        own_queries,
        own_queries * width + place_of_own[:, None, None],
        shared_queries,
        shared_queries * width + place_of_shared[:, None, :, None],
        entries,
    )
