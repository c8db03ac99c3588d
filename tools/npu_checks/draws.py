"""Item `draws`: tokens drawn from given logits are those that must come, on every rank of a TP group.

Each uniform number is put in the middle of a chosen token's interval, so that rounding cannot decide
which token it means, and the right answer is known without any sampler.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import in_world
from r1zero.distributed.groups import World
from r1zero.distributed.placement import RoleSize
from r1zero.policy.logprobs import token_logprobs
from r1zero.rollout.interface import Sampling
from r1zero.rollout.sampler import sample

COLUMNS = 9504  # of the vocabulary on each rank, as of Qwen2.5 on 16
LIKELY = 1e-3  # tokens below this probability are not asked for
CLOSE = 1e-4  # nats between log-probs in fp32
WIDTH = 64  # of the hidden states
ADVICE = (
    "exp, cumsum, sort or a collective (MAX, all_gather) of this device is not what PyTorch says: "
    "run `--only groups,operators` and send us the JSON"
)
SAMPLINGS = {
    "whole distribution": Sampling(1.0, 1.0, 0, seed=0),
    "temperature 0.7": Sampling(0.7, 1.0, 0, seed=0),
    "top-k 50": Sampling(1.0, 1.0, 50, seed=0),
    "top-p 0.9": Sampling(1.0, 0.9, 0, seed=0),
}


@dataclass(frozen=True, slots=True)
class Draw:
    """Logits [n, V] with the uniform numbers [n] that mean given tokens [n], on the CPU."""

    logits: torch.Tensor
    uniform: torch.Tensor
    tokens: torch.Tensor
    logprobs: torch.Tensor  # [n] of the whole distribution at this temperature


def run(check: Check) -> Figures:
    """Draw with every TP size that divides the ranks."""
    sizes = list(tensor_parallel_sizes(check.launch.world_size))
    roles = {f"tp{size}": RoleSize(check.launch.world_size, size) for size in sizes}

    def draw(world: World) -> Figures:
        rows = 16 if check.small else 256
        for size in sizes:
            compare_draws(world, f"tp{size}", size, rows)
            compare_logprobs(world, f"tp{size}", size)
        shown = ", ".join(map(str, sizes))
        return Figures(
            f"TP {shown}: {rows} tokens in each of {len(SAMPLINGS)} ways as they must be, "
            "log-probs, too",
            {"tp": sizes, "rows": rows},
        )

    return in_world(check, roles, draw)


def tensor_parallel_sizes(ranks: int) -> Iterator[int]:
    """1, 2, 4 ... as far as they divide the ranks."""
    size = 1
    while ranks % size == 0:
        yield size
        size *= 2


def compare_draws(world: World, role: str, size: int, rows: int) -> None:
    """Draw on this rank's part of the vocabulary. CheckFailed where a token is another."""
    group = world.roles[role].groups["tp"]
    for name, sampling in SAMPLINGS.items():
        given = draw_of(size * COLUMNS, rows, sampling)
        mine = shard(given.logits, dim=1, group=group).to(world.device.torch)
        tokens, logprobs = sample(
            mine, given.uniform.to(world.device.torch), sampling, group if size > 1 else None
        )
        wrong = (tokens.cpu() != given.tokens).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise CheckFailed(
                f"TP {size}, {name}: {len(wrong)} of {rows} tokens are others than they must be, "
                f"in row {row} token {int(tokens[row])} instead of {int(given.tokens[row])}",
                ADVICE,
            )
        off = float((logprobs.cpu() - given.logprobs).abs().max())
        if not off <= CLOSE:
            raise CheckFailed(
                f"TP {size}, {name}: log-probs of drawn tokens are off by {off:.2g} nats", ADVICE
            )


def draw_of(vocabulary: int, rows: int, sampling: Sampling) -> Draw:
    """Random logits, and for each row a likely token with the uniform number that means it."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(rows, vocabulary, generator=generator)
    logprobs = torch.log_softmax(logits.double() / sampling.temperature, dim=-1)
    uniform = torch.empty(rows)
    tokens = torch.empty(rows, dtype=torch.int64)
    for row in range(rows):
        order, kept = kept_tokens(logprobs[row].exp(), sampling)
        running = kept.cumsum(dim=0) / kept.sum()
        share = kept / kept.sum()
        likely = (share > LIKELY).nonzero().flatten()
        place = likely[torch.randint(len(likely), (), generator=generator)]
        uniform[row] = running[place] - share[place] / 2
        tokens[row] = order[place]
    chosen = logprobs.gather(1, tokens[:, None])[:, 0].float()
    return Draw(logits, uniform, tokens, chosen)


def kept_tokens(probs: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in the order in which their intervals lie, and the probability that each keeps.

    By id; with a filter by falling probability, of which the first `top_k` stay, and of these as many
    as it takes to hold `top_p`.
    """
    if sampling.top_k == 0 and sampling.top_p == 1.0:
        return torch.arange(len(probs)), probs
    ordered, order = probs.sort(descending=True, stable=True)
    if sampling.top_k > 0:
        ordered[sampling.top_k :] = 0.0
    before = ordered.cumsum(dim=0) - ordered
    return order, torch.where(before < sampling.top_p * ordered.sum(), ordered, 0.0)


def compare_logprobs(world: World, role: str, size: int) -> None:
    """Log-probs of given tokens by the trainer's function, against fp32 and plain bf16 on the CPU."""
    generator = torch.Generator().manual_seed(size)
    group = world.roles[role].groups["tp"]
    hidden = torch.randn(16, WIDTH, generator=generator).bfloat16()
    weight = torch.randn(size * COLUMNS, WIDTH, generator=generator).bfloat16() / 4
    targets = torch.randint(len(weight), (16,), generator=generator)
    device = world.device.torch
    found, _ = token_logprobs(
        hidden.to(device),
        shard(weight, dim=0, group=group).to(device),
        targets.to(device),
        1.0,
        group,
    )
    truth = logprobs_of(hidden.float() @ weight.float().t(), targets)
    plain = logprobs_of(hidden @ weight.t(), targets)
    off = float((found.cpu() - truth).abs().max())
    allowed = 2 * float((plain - truth).abs().max())
    if not off <= allowed:
        raise CheckFailed(
            f"TP {size}: log-probs of given tokens are off by {off:.2g} nats, where twice plain "
            f"bf16 is {allowed:.2g}",
            ADVICE,
        )


def logprobs_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs [n] of tokens [n] under logits [n, V]."""
    return torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None])[:, 0]


def shard(whole: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part along an axis."""
    return whole.chunk(dist.get_world_size(group), dim=dim)[dist.get_rank(group)].contiguous()
