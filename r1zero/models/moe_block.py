"""Mixture of experts in the rollout engine: the router, and the experts in place of a layer's MLP.

    scores = router(norm(h))                          in fp32, whatever the weights' type
    h += sum over the top k experts e of  p_e * down_e(silu(gate_e(x)) * up_e(x))
    p = softmax of the k scores that were chosen      = softmax of all, renormalised over these

(Shazeer et al. 2017; Qwen3 technical report, 2025.) Experts lie whole on the TP ranks, each with an
equal share of them in order, so that the sum that ends every MLP is the only communication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1zero.models.config import ModelConfig
from r1zero.models.family import ForwardPass, LayerWeights

if TYPE_CHECKING:
    import torch


class MoeMlp:
    """The experts of one layer, as `DenseBlock` takes them in place of its MLP."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights) -> None:
        assert config.experts is not None
        self.place = config.experts.layers.index(layer)  # among the layers that have experts
        self.router = weights.router("mlp.router.weight")
        self.experts = weights.experts("mlp.experts")

    def __call__(self, x: torch.Tensor, run: ForwardPass) -> torch.Tensor:
        """What this rank's experts add: x [T, H] -> [T, H], to be summed over the TP ranks."""
        scores = self.router(x)
        ids = run.choose_experts(self.place, scores)
        weights = scores.gather(1, ids).softmax(dim=-1)
        return run.operators.experts(x, ids, weights, self.experts)
