"""Mixture of experts in the rollout engine: the router, and the experts in place of a layer's MLP.

    scores = router(norm(h))                          in fp32, whatever the weights' type
    h += sum over the chosen experts e of  p_e * down_e(silu(gate_e(x)) * up_e(x))

Softmax (Shazeer et al. 2017; Qwen3 technical report, 2025): chosen are the k highest scores,

    p = softmax of the k scores that were chosen      = softmax of all, renormalised over these

Sigmoid (DeepSeek-V3 technical report, 2024, equations 12 to 16): chosen are the k highest of
sigmoid(scores) + bias, of the best groups of experts only where there are groups,

    p = scale * s / sum of the chosen s,              s = sigmoid(scores), without the bias
    h += shared experts(x)                            one gated MLP that computes every token

Experts lie whole on the TP ranks, each with an equal share of them in order; shared experts are cut
as any MLP. So the sum that ends every MLP is the only communication.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from r1zero.models.config import Experts, ModelConfig
from r1zero.models.dense import GatedMlp
from r1zero.models.family import ForwardPass, LayerWeights

if TYPE_CHECKING:
    import torch

# Experts of a group whose scores add up to the group's.
BEST_OF_GROUP = 2
# Added to a sum that is divided by, as in Hugging Face's code.
TINY = 1e-20


class MoeMlp:
    """The experts of one layer, as `DenseBlock` and `LatentBlock` take them in place of their
    MLP."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights) -> None:
        assert config.experts is not None
        self.config = config.experts
        self.place = config.experts.layers.index(layer)  # among the layers that have experts
        self.router = weights.router("mlp.router.weight")
        self.experts = weights.experts("mlp.experts")
        self.bias: torch.Tensor | None = None
        if config.experts.has_bias:
            self.bias = weights.tensor("mlp.router.expert_bias")  # fp32 [experts]
        self.shared: GatedMlp | None = None
        if config.experts.shared_ffn_size:
            self.shared = GatedMlp(weights, "mlp.shared_experts")

    def __call__(self, x: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """What this rank's experts add: x [T, H] -> [T, H], to be summed over the TP ranks."""
        ids, weights = self._route(x, run)
        found = run.operators.experts(x, ids, weights, self.experts)
        if self.shared is None:
            return found
        return found + self.shared(x, run)

    def _route(self, x: torch.Tensor, run: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, int64 [T, k], and their weights, fp32 [T, k]."""
        scores = self.router(x)
        if self.config.scores == "softmax":
            ids = run.choose_experts(self.place, scores)
            return ids, scores.gather(1, ids).softmax(dim=-1)
        scores = scores.sigmoid()
        assert self.bias is not None, "sigmoid scores have one"
        ids = run.choose_experts(self.place, in_best_groups(scores + self.bias, self.config))
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(dim=-1, keepdim=True) + TINY) * self.config.scale


def in_best_groups(scores: torch.Tensor, experts: Experts) -> torch.Tensor:
    """Hide the experts of all but a token's best groups: scores [T, experts], -inf where hidden.

    A group counts as much as its two best experts together. Of two groups of three, one is kept:

    >>> import torch
    >>> experts = Experts(count=6, top_k=2, ffn_hidden_size=8, layers=(0,), groups=2)
    >>> in_best_groups(torch.tensor([[9.0, 1.0, 0.0, 6.0, 5.0, 0.0]]), experts)
    tensor([[-inf, -inf, -inf, 6., 5., 0.]])
    """
    if experts.groups == 1:
        return scores
    grouped = scores.view(len(scores), experts.groups, -1)
    of_group = grouped.topk(BEST_OF_GROUP, dim=-1).values.sum(dim=-1)
    best = of_group.topk(experts.top_k_groups, dim=-1).indices
    kept = of_group.new_zeros(of_group.shape).scatter_(1, best, 1.0)
    return grouped.masked_fill(kept[..., None] == 0, -math.inf).flatten(1)
