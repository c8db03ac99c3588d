"""Routing replay on Megatron's own router: the recorded experts are chosen, and the router learns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from support.multiproc import DEVICE

from r1zero.models.router_replay import RouterAgreement, RouterReplay

TOKENS, EXPERTS, TOP_K = 6, 8, 3


def batch(routes, predictions=None):
    return SimpleNamespace(routes=routes, predictions=predictions)


def random_routes(layers: int = 1) -> torch.Tensor:
    """uint8 [T, layers, k], distinct experts of each token."""
    scores = torch.rand(TOKENS, layers, EXPERTS, generator=torch.Generator().manual_seed(3))
    return scores.topk(TOP_K, -1).indices.to(torch.uint8)


def replayed(logits: torch.Tensor, routes: torch.Tensor | None, **options: object) -> tuple:
    """Megatron's routing with a replay in its place: weights and choice, both [T, experts]."""
    replay = RouterReplay(0, RouterAgreement(DEVICE.torch))
    replay.take(batch(routes))
    return topk_routing_with_score_function(logits, TOP_K, router_replay=replay, **options)


@pytest.mark.parametrize("options", [{}, {"use_pre_softmax": True}, {"score_function": "sigmoid"}])
def test_recorded_experts_are_weighed_by_the_router_as_it_is(options):
    logits = torch.randn(TOKENS, EXPERTS, requires_grad=True)
    routes = random_routes()
    weights, choice = replayed(logits, routes, **options)
    chosen = routes[:, 0].long()
    assert torch.equal(
        choice, torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, chosen, 1 > 0)
    )
    # softmax over the chosen, over all, or sigmoids made to add up to 1
    expected = torch.zeros(TOKENS, EXPERTS).scatter(
        1, chosen, plain_weights(logits, chosen, options)
    )
    torch.testing.assert_close(weights, expected)
    of_output = torch.randn(TOKENS, EXPERTS)
    [found] = torch.autograd.grad((weights * of_output).sum(), logits, retain_graph=True)
    [wanted] = torch.autograd.grad((expected * of_output).sum(), logits)
    assert wanted.abs().max() > 0.01, "the router learns"
    torch.testing.assert_close(found, wanted)


def plain_weights(logits: torch.Tensor, chosen: torch.Tensor, options: dict) -> torch.Tensor:
    if "score_function" in options:
        scores = logits.gather(1, chosen).sigmoid()
        return scores / scores.sum(-1, keepdim=True)
    if "use_pre_softmax" in options:
        return logits.softmax(-1).gather(1, chosen)
    return logits.gather(1, chosen).softmax(-1)


def test_without_routes_the_router_chooses_itself():
    logits = torch.randn(TOKENS, EXPERTS)
    for mine, theirs in zip(
        replayed(logits, None), topk_routing_with_score_function(logits, TOP_K), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_a_layer_replays_its_own_column():
    routes = random_routes(layers=3)
    replay = RouterReplay(2, RouterAgreement(DEVICE.torch))
    replay.take(batch(routes))
    logits = torch.randn(TOKENS, EXPERTS)
    _, choice = topk_routing_with_score_function(logits, TOP_K, router_replay=replay)
    assert torch.equal(
        choice.nonzero()[:, 1].view(TOKENS, TOP_K), routes[:, 2].long().sort(-1).values
    )


def test_agreement_counts_sets_of_experts_where_response_tokens_are_predicted():
    logits = torch.tensor([[5.0, 4, 3, 0, 0], [5, 4, 3, 0, 0], [5, 4, 3, 0, 0], [5, 4, 3, 0, 0]])
    routes = torch.tensor([[2, 1, 0], [0, 1, 3], [0, 1, 2], [4, 3, 1]], dtype=torch.uint8)[:, None]
    predictions = torch.tensor([2, 1, 0, 3])  # the third is in the middle of a prompt
    agreement = RouterAgreement(DEVICE.torch)
    replay = RouterReplay(0, agreement)
    replay.take(batch(routes, predictions))

    def run() -> None:
        topk_routing_with_score_function(logits, 3, router_replay=replay)

    run()
    assert agreement.take().tolist() == [0, 0], "nobody asked"
    with agreement.counting(with_gradients=True):
        with torch.no_grad():
            run()  # a layer that is recomputed runs like this first
        run()
        run()
    assert agreement.take().tolist() == [4, 12]
    with agreement.counting(with_gradients=False), torch.no_grad():
        run()
    assert agreement.take().tolist() == [2, 6]
    assert agreement.take().tolist() == [0, 0]


def test_routes_of_other_tokens_are_a_fault():
    with pytest.raises(AssertionError, match="routes are those of these tokens"):
        replayed(torch.randn(TOKENS + 1, EXPERTS), random_routes())
