"""StackedExperts: the experts of a MoE layer that a rank holds, in two parameters.

    linear_fc1.weight [E / EP, 2 F, H]    gate and up of each expert, as in Hugging Face's order
    linear_fc2.weight [E / EP, H, F]      its down

They stand where megatron-core's layer has its experts; its router and its dispatcher stay. Its own
SequentialMLP has a module for each expert: 12627 parameters in Qwen3-30B-A3B, where here there
are 435. And with TP 2 and EP 1 its gradients are wrong, since it does not mark its weights then.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.router import TopKRouter

if not hasattr(moe_utils, "te_general_gemm"):
    # megatron-core's router asks for it in every pass, and has it only beside Transformer Engine.
    moe_utils.te_general_gemm = None


class StackedExperts(MegatronModule):
    """Takes what MoELayer hands its experts: rows sorted by expert."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: object = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        assert config.moe_ffn_hidden_size is not None
        self.groups = pg_collection
        hidden = config.hidden_size
        ffn = config.moe_ffn_hidden_size
        self.linear_fc1 = _Stack((num_local_experts, 2 * ffn, hidden), config.params_dtype)
        self.linear_fc2 = _Stack((num_local_experts, hidden, ffn), config.params_dtype)

    def forward(
        self, rows: torch.Tensor, rows_per_expert: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """rows [N, H], of which the first expert has the first rows_per_expert[0] and so on; probs fp32
        [N], what the router gives each row. Returns [N, H], and that there is no bias."""
        counts = rows_per_expert.tolist()
        outputs = []
        for expert_rows, expert_probs, gate_up, down in zip(
            rows.split(counts),
            probs.split(counts),
            self.linear_fc1.weight.unbind(),
            self.linear_fc2.weight.unbind(),
            strict=True,
        ):
            outputs.append(expert_mlp(expert_rows, expert_probs, gate_up, down))
        return torch.cat(outputs), None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, ShardedTensor]:
        """Where this rank's experts lie among all of the layer, under megatron-core's own names.

        `sharded_offsets` tell of axes in front, that of the layers: (axis, index, count). Left to
        megatron-core the experts of all EP ranks would count as copies of the same, and one rank's
        be saved.
        """
        axes = len(sharded_offsets)
        ep = self.groups.ep
        state = {}
        for name, stack in (("linear_fc1", self.linear_fc1), ("linear_fc2", self.linear_fc2)):
            state[f"{prefix}{name}.weight"] = ShardedTensor.from_rank_offsets(
                f"{prefix}experts.{name}.weight",
                stack.weight,
                *sharded_offsets,
                (axes, ep.rank(), ep.size()),
                replica_id=(0, 0, self.groups.expt_dp.rank()),
                prepend_axis_num=axes,
            )
        return state


class BiasedRouter(TopKRouter):
    """A router that chooses by scores and a bias of each expert, which is loaded and stays as it is.

    Megatron moves its own at each update, by 0 at the least, and sums over all ranks for it.
    """

    def __init__(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        assert config.num_moe_experts is not None
        device = torch.cuda.current_device()
        del self.expert_bias
        bias = torch.zeros(config.num_moe_experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias)


def expert_mlp(
    rows: torch.Tensor, probs: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """One expert's gated MLP, times the router's weights: [n, H].

    rows [n, H], probs fp32 [n], gate_up [2 F, H], down [H, F]. The weight is applied before the second
    product and in fp32, as megatron-core does: in bf16 another place is another result.
    """
    gate, up = F.linear(rows, gate_up).chunk(2, dim=-1)
    activated = F.silu(gate) * up
    weighted = (activated * probs[:, None]).to(rows.dtype)
    return F.linear(weighted, down)


class _Stack(torch.nn.Module):
    """A weight of all local experts."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        # Its gradient is summed over those who hold the same experts, and not over the replicas. At
        # EP 1, too: there these are all ranks of the stage, whose TP ranks see other tokens.
        setattr(self.weight, "allreduce", False)  # noqa: B010
