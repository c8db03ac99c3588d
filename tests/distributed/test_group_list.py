"""Which groups a rank is in: worked by hand, and against all ranks of a world at once."""

from __future__ import annotations

import pytest

from r1zero.distributed.group_list import PlannedGroup, count_groups, groups_of
from r1zero.distributed.placement import Placement, RankGrid, RoleSize, place

SEED = place(
    {"train": RoleSize(8, 2, 4), "rollout": RoleSize(6, 2), "ref": RoleSize(2)}, colocate=False
)
WHOLE = place(
    {"train": RoleSize(8, 2, 2), "rollout": RoleSize(8, 4), "ref": RoleSize(8)}, colocate=True
)
WIDE = place(
    {"train": RoleSize(24, 2, 3), "rollout": RoleSize(8, 4), "ref": RoleSize(4, 1, 2)},
    colocate=False,
)


def by_name(placement: Placement, rank: int) -> dict[str, PlannedGroup]:
    return {name: group for group in groups_of(placement, rank, 200) for name in group.names}


def test_the_groups_of_a_train_rank_worked_by_hand() -> None:
    placed = place({"train": RoleSize(8, 2, 2), "rollout": RoleSize(1)}, colocate=False)
    found = by_name(placed, 5)
    assert {name.split()[1]: group.ranks for name, group in found.items()} == {
        "role_control": (0, 1, 2, 3, 4, 5, 6, 7),
        "replica_control": (0, 1, 4, 5),
        "tp": (4, 5),
        "dp": (5, 7),
        "pp": (1, 5),
        "mp": (0, 1, 4, 5),
        "all": (0, 1, 2, 3, 4, 5, 6, 7),
        "embd": (1, 5),
        "self": (5,),
        "cp": (5,),
        "ep": (5,),
        "expt_dp": (4, 5, 6, 7),
        "tp_dp": (4, 5, 6, 7),
        "tp_ep_pp": (1, 5),
    }
    taken = {name.split()[1]: group.device_megabytes for name, group in found.items()}
    assert taken == dict.fromkeys(taken, 0) | {
        "tp": 400,
        "dp": 400,
        "pp": 400,
        "all": 32,
        "embd": 400,  # one group with pp, where there are two stages
        "tp_ep_pp": 400,  # the same
    }


def test_the_groups_of_experts_and_of_context_parallelism_worked_by_hand() -> None:
    """TP 2, CP 2, DP 2, PP 2: rank 5 of stage 0 has tp 1, cp 0, dp 1, and its experts have index 1 of
    4."""
    role = RoleSize(16, tp=2, pp=2, cp=2, ep=4)
    placed = place({"train": role, "rollout": RoleSize(1)}, colocate=False)
    assert placed.train.index_of(5) == {"tp": 1, "cp": 0, "dp": 1, "pp": 0}
    assert placed.train.place_in_stage(5) == 5 and placed.train.place_in_stage(8 + 6) == 6
    assert placed.train.expert_index(5) == 1 and placed.train.expert_data_size == 2
    found = {name.split()[1]: group for name, group in by_name(placed, 5).items()}
    assert found["cp"].ranks == (5, 7)
    assert found["dp"].ranks == (1, 3, 5, 7)
    assert found["mp"].ranks == (4, 5, 12, 13)
    assert found["replica_control"].ranks == (4, 5, 6, 7, 12, 13, 14, 15)
    assert found["ep"].ranks == (4, 5, 6, 7)
    assert found["expt_dp"].ranks == (1, 5)
    assert found["tp_dp"].ranks == tuple(range(8))
    assert found["tp_ep_pp"].ranks == (4, 5, 6, 7, 12, 13, 14, 15)
    assert not placed.train.experts_span_replicas, "four ranks hold a replica, and all experts"
    assert RankGrid.of("ref", 0, 8, tp=2, ep=4).experts_span_replicas
    assert found["ep"].warm and found["expt_dp"].megabytes == 200


@pytest.mark.parametrize(("rank", "megabytes"), [(0, 832), (8, 400), (14, 0)])
def test_device_memory_of_groups_in_the_layout_of_the_text(rank: int, megabytes: int) -> None:
    """8 train TP2 PP4, 6 rollout TP2, 2 ref. Groups of one rank take none."""
    groups = groups_of(SEED, rank, 200)
    assert sum(group.device_megabytes for group in groups) == megabytes
    assert all(group.megabytes <= 16 for group in groups if len(group.ranks) == 1)


EXPERTS = place(
    {
        "train": RoleSize(16, tp=2, pp=2, cp=2, ep=4),
        "rollout": RoleSize(8, tp=2, ep=4),
        "ref": RoleSize(8, tp=2, ep=8, cp=2),
    },
    colocate=False,
)


@pytest.mark.parametrize("placement", [SEED, WHOLE, WIDE, EXPERTS])
def test_all_members_list_a_group_alike_and_nobody_else_does(placement: Placement) -> None:
    listed: dict[tuple[str, tuple[int, ...]], dict[int, PlannedGroup]] = {}
    for rank in range(placement.world_size):
        for group in groups_of(placement, rank, 200):
            listed.setdefault((group.plane, group.ranks), {})[rank] = group
    for (_, ranks), by_rank in listed.items():
        assert tuple(by_rank) == ranks
        assert len(set(by_rank.values())) == 1
    if not placement.colocated:
        assert len(listed) == sum(count_groups(span) for span in placement.grids)


@pytest.mark.parametrize("placement", [SEED, WHOLE, WIDE, EXPERTS])
def test_no_ranks_wait_for_one_another_in_a_circle(placement: Placement) -> None:
    """Whoever takes the first of its groups with all others that are there gets through."""
    waiting = {}
    for rank in range(placement.world_size):
        waiting[rank] = [(group.plane, group.ranks) for group in groups_of(placement, rank, 200)]
    while any(waiting.values()):
        ready = [
            groups[0]
            for groups in waiting.values()
            if groups and all(waiting[member][0] == groups[0] for member in groups[0][1])
        ]
        assert ready, waiting
        for group in set(ready):
            for member in group[1]:
                waiting[member].pop(0)


def test_replicas_that_share_experts_meet_by_their_tp_index() -> None:
    """Rollout ranks 16 to 23, two groups of two replicas of TP 2."""
    for rank, met in ((16, (16, 18)), (17, (17, 19)), (22, (20, 22)), (23, (21, 23))):
        for name in ("rollout ep_dp", "rollout ep_dp_control"):
            assert by_name(EXPERTS, rank)[name].ranks == met
    assert not any(name.startswith("rollout ep") for name in by_name(SEED, 8))


def test_ranks_shared_by_roles_have_one_group_that_decodes_for_nobody() -> None:
    """HCCL forbids that for a group that has a use in training, too."""
    placed = place({"train": RoleSize(4, 2), "rollout": RoleSize(4, 2)}, colocate=True)
    shared = by_name(placed, 0)["rollout tp"]
    assert "train tp" in shared.names and not shared.decodes
    assert by_name(SEED, 8)["rollout tp"].decodes
