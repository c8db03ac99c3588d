"""The experts of the rollout engine: PyTorch's, those of the CPU's kernel and of NPUs, against a sum
written token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.launches import Launches
from support.npu_process import on_npu

from r1zero.models.family import LocalExperts
from r1zero.ops import compiled, npu
from r1zero.rollout import native, npu_operators
from r1zero.rollout.experts import multiply_by_experts
from r1zero.rollout.operators import Heads, Operators
from r1zero.rollout.routes import FREE, Routes, forced_routes

# tokens, experts per token, experts, width, inner width
CASES = {
    "few": (5, 2, 4, 64, 48),
    "odd sizes": (13, 3, 6, 33, 17),
    "one token": (1, 2, 8, 32, 16),
    "many tokens of an expert": (80, 2, 4, 32, 16),
}
HELD = {"all": (0, 1), "the first half": (0, 2), "the second half": (1, 2)}  # part, of so many


def inputs(case, part, parts, dtype):
    """Tokens, their experts and weights, and the experts of one of several ranks."""
    tokens, top_k, total, width, inner = CASES[case]
    generator = torch.Generator().manual_seed(3)
    held = total // parts
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    gate_up = torch.randn(total, 2 * inner, width, generator=generator).to(dtype) / 8
    down = torch.randn(total, width, inner, generator=generator).to(dtype) / 8
    scores = torch.randn(tokens, total, generator=generator)
    ids = scores.topk(top_k).indices
    weights = scores.gather(1, ids).softmax(-1)
    mine = slice(part * held, (part + 1) * held)
    return x, ids, weights, LocalExperts(gate_up[mine], down[mine], part * held, total)


def by_hand(x, ids, weights, experts):
    """The sum, one token and one expert at a time, in fp32."""
    output = torch.zeros(x.shape)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            number = expert - experts.first
            if 0 <= number < len(experts.gate_up):
                gate, up = (experts.gate_up[number].float() @ x[token].float()).chunk(2)
                hidden = F.silu(gate) * up * weight
                output[token] += experts.down[number].float() @ hidden
    return output


def operators_of(kind, dtype):
    heads = Heads(
        1, 1, 16, 1e-6, 0.25, torch.zeros(1, 16, dtype=dtype), torch.zeros(1, 16, dtype=dtype)
    )
    if kind == "plain":
        return Operators(heads)
    library, reason = compiled.load(native.SOURCE)
    assert library is not None, reason
    return native.NativeOperators(heads, library)


def difference(found, expected):
    """Relative to the largest element."""
    return float((found.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["plain", "native"])
def test_experts_equal_a_sum_by_hand(kind, case, held):
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        given = inputs(case, *HELD[held], dtype)
        found = operators_of(kind, dtype).experts(*given)
        assert found.dtype == dtype
        assert difference(found, by_hand(*given)) < tolerance


def test_the_ranks_parts_add_up_to_the_whole():
    whole = operators_of("plain", torch.float32).experts(*inputs("few", 0, 1, torch.float32))
    parts = [
        operators_of("plain", torch.float32).experts(*inputs("few", part, 2, torch.float32))
        for part in (0, 1)
    ]
    assert difference(parts[0] + parts[1], whole) < 1e-6


def test_a_weight_multiplies_the_activation_in_fp32_as_in_megatron():
    """In bf16 it makes a difference, by which routers of later layers would choose otherwise."""
    x, ids, weights, experts = inputs("many tokens of an expert", 0, 1, torch.bfloat16)
    ids = ids[:, :1]
    weights = weights[:, :1]
    found = operators_of("plain", torch.bfloat16).experts(x, ids, weights, experts)
    expected = torch.empty_like(x)
    for number in range(experts.total):
        rows = ids[:, 0] == number
        gate, up = F.linear(x[rows], experts.gate_up[number]).chunk(2, dim=-1)
        scaled = (F.silu(gate) * up * weights[rows]).to(torch.bfloat16)
        expected[rows] = F.linear(scaled, experts.down[number])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_kernel_rounds_where_the_products_of_many_tokens_do():
    """One expert a token, so that no sum hides it. Sums in another order round few elements otherwise."""
    x, ids, weights, experts = inputs("few", 0, 1, torch.bfloat16)
    x = x.repeat(3, 1)
    ids = ids[:, :1].repeat(3, 1)
    weights = weights[:, :1].repeat(3, 1)
    made = operators_of("native", torch.bfloat16)
    few = made.experts(x, ids, weights, experts)
    many = multiply_by_experts(x, ids, weights, experts, made.silu_mul)
    assert (few != many).float().mean() < 0.05


def test_a_token_is_computed_alike_whatever_runs_beside_it():
    x, ids, weights, experts = inputs("odd sizes", 0, 1, torch.float32)
    made = operators_of("native", torch.float32)
    together = made.experts(x, ids, weights, experts)
    for token in range(len(x)):
        one = slice(token, token + 1)
        torch.testing.assert_close(
            made.experts(x[one], ids[one], weights[one], experts), together[one], rtol=0, atol=0
        )


# -- on NPUs --------------------------------------------------------------------------------------


def npu_difference(case: str, part: int, parts: int, few: int) -> float:
    """Of the fused operators on the stand-in to a sum by hand; `few` tokens are computed without
    waiting for their counts."""
    x, ids, weights, experts = inputs(case, part, parts, torch.bfloat16)
    tables = torch.zeros(1, 16, dtype=torch.bfloat16, device="npu")
    made = native.operators(Heads(1, 1, 16, 1e-6, 0.25, tables, tables))
    there = LocalExperts(
        experts.gate_up.to("npu"), experts.down.to("npu"), experts.first, experts.total
    )
    usual = npu_operators.FEW_TOKENS
    npu_operators.FEW_TOKENS = few
    try:
        found = made.experts(x.to("npu"), ids.to("npu"), weights.to("npu"), there)
    finally:
        npu_operators.FEW_TOKENS = usual
    assert found.device.type == "npu" and found.dtype == torch.bfloat16
    return difference(found.cpu(), by_hand(x, ids, weights, experts))


@pytest.mark.parametrize("few", [0, 512], ids=["counts are read", "counts stay on the device"])
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("case", ["few", "odd sizes"])
def test_experts_by_the_fused_operators(case, held, few):
    assert on_npu(npu_difference, case, *HELD[held], few) < 2e-2


def test_a_single_expert_of_a_rank_takes_the_plain_product():
    """The grouped product takes two groups at least."""
    for part in range(4):
        assert on_npu(npu_difference, "few", part, 4, 512) < 2e-2


def experts_in_a_capture(parts: int) -> None:
    """Nothing in them waits for the device, which a capture refuses."""
    x, ids, weights, experts = inputs("few", 0, parts, torch.bfloat16)
    tables = torch.zeros(1, 16, dtype=torch.bfloat16, device="npu")
    made = native.operators(Heads(1, 1, 16, 1e-6, 0.25, tables, tables))
    there = LocalExperts(experts.gate_up.to("npu"), experts.down.to("npu"), 0, experts.total)
    on_device = [tensor.to("npu") for tensor in (x, ids, weights)]
    with torch.npu.graph(torch.npu.NPUGraph()):
        made.experts(*on_device, there)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_experts_can_be_captured(parts):
    on_npu(experts_in_a_capture, parts)


def experts_launches(parts: int) -> int:
    x, ids, weights, experts = inputs("few", 0, parts, torch.bfloat16)
    tables = torch.zeros(1, 16, dtype=torch.bfloat16, device="npu")
    made = native.operators(Heads(1, 1, 16, 1e-6, 0.25, tables, tables))
    there = LocalExperts(experts.gate_up.to("npu"), experts.down.to("npu"), 0, experts.total)
    on_device = [tensor.to("npu") for tensor in (x, ids, weights)]
    with Launches() as seen:
        made.experts(*on_device, there)
    return seen.counted.total()


def test_launches_of_the_experts_of_a_layer():
    assert on_npu(experts_launches, 1) == 16
    assert on_npu(experts_launches, 2) == 19, "and the rows that go elsewhere are counted"


def rows_multiplied(shares_experts: bool) -> tuple[int, int]:
    """Rows of the grouped product of few tokens on the second of two ranks, and how many of their
    copies go to its experts."""
    x, ids, weights, experts = inputs("few", 1, 2, torch.bfloat16)
    tables = torch.zeros(1, 16, dtype=torch.bfloat16, device="npu")
    made = native.operators(Heads(1, 1, 16, 1e-6, 0.25, tables, tables))
    made.shares_experts = shares_experts
    held = range(experts.first, experts.first + len(experts.gate_up))
    there = LocalExperts(
        experts.gate_up.to("npu"), experts.down.to("npu"), experts.first, experts.total
    )
    rows = []
    multiply = npu.grouped_matmul

    def counted(x, weight, counts):
        rows.append(len(x))
        return multiply(x, weight, counts)

    npu.grouped_matmul = counted
    try:
        made.experts(x.to("npu"), ids.to("npu"), weights.to("npu"), there)
    finally:
        npu.grouped_matmul = multiply
    return rows[0], sum(int(expert) in held for expert in ids.flatten())


def test_where_replicas_share_experts_a_rank_multiplies_its_own_copies_only():
    rows, own = on_npu(rows_multiplied, True)
    assert rows == own
    rows, own = on_npu(rows_multiplied, False)
    assert rows > own, "not to wait for their number"


# -- choosing -------------------------------------------------------------------------------------


def test_a_token_goes_to_the_experts_it_is_forced_to_and_others_choose():
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]])
    recorded = np.array([[[0, 1], [1, 2]]], np.uint8)  # of one token in two layers
    forced = forced_routes([recorded, None], [1, 1], torch.device("cpu"))
    assert forced[1].eq(FREE).all()
    routes = Routes(2, forced)
    assert routes.choose(0, scores).tolist() == [[0, 1], [0, 1]]
    assert routes.choose(1, scores).tolist() == [[1, 2], [0, 1]]
    taken = routes.taken()
    assert taken.dtype == torch.uint8
    assert taken.tolist() == [[[0, 1], [1, 2]], [[0, 1], [0, 1]]]


def test_a_pass_through_dense_layers_has_no_routes():
    assert Routes(0).taken() is None
    assert forced_routes([None, None], [3, 4], torch.device("cpu")) is None
