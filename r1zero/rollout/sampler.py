"""Sampling: temperature, top-k, top-p; one uniform number a token, vocabulary-parallel.

The uniform of a token depends on (seed, step, prompt, sample, position) and on nothing else, so who
generates a sample, and beside whom, does not change it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from r1zero.rollout.interface import Sampling

# Tokens summed at once before the search narrows to one block.
MAX_BLOCK = 128
# Likeliest tokens that the filters look at first: sorting a vocabulary takes longer than a decoding
# step.
CANDIDATES = 256
# Largest float32 below 1: keeps a scaled uniform strictly below the total it is scaled by.
BELOW_ONE = 1.0 - 2.0**-23


def uniforms(seed: int, step: int, position: int, member: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of one sample's tokens, fp32 [count] (Philox, Salmon et al. 2011).

    A counter-based generator: entry t is the same whatever `count` is.
    """
    generator = np.random.Philox(key=[seed, step], counter=[0, position, member, 0])
    return np.random.Generator(generator).random(count, dtype=np.float32)


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row. logits [n, V / TP] in any float type, uniform fp32 [n].

    Returns (tokens int64 [n], log-probs fp32 [n]), equal on all TP ranks. The log-prob is that of
    the whole distribution at this temperature, before top-k and top-p, as the trainer computes it.
    `group` is None without tensor parallelism.
    """
    if sampling.temperature != 1.0:
        logits = logits.float() / sampling.temperature
    if sampling.top_k > 0 or sampling.top_p < 1.0:
        return _sample_filtered(logits.float(), uniform, sampling, group)
    if group is None:
        weights = torch.softmax(logits, dim=-1, dtype=torch.float32)  # one pass over the logits
    else:
        logits = logits.float()
        top = logits.amax(dim=-1, keepdim=True)
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        weights = (logits - top).exp_()
    tokens, chosen, total = _invert(weights, uniform, group)
    return tokens, (chosen / total).log_()


def _invert(
    weights: torch.Tensor, uniform: torch.Tensor, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the token where the running sum of `weights` [n, V / TP] passes uniform * total.

    First over sums of blocks, then inside the block found. Returns (tokens, their weights, totals).
    """
    count, width = weights.shape
    block = _block_size(width, group)
    if width % block:  # only without TP: the last block is filled up with zeros
        weights = torch.nn.functional.pad(weights, (0, block - width % block))
    local = weights.view(count, -1, block)
    sums = local.sum(dim=-1)
    if group is not None:
        parts = [torch.empty_like(sums) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, sums, group=group)
        sums = torch.cat(parts, dim=1)
    running = sums.cumsum(dim=1)
    total = running[:, -1]
    index, rest = _search(running, uniform * total)
    if group is None:
        first = 0
    else:
        first = dist.get_rank(group) * local.shape[1]
    here = (index >= first) & (index < first + local.shape[1])
    mine = local[torch.arange(count, device=index.device), torch.where(here, index - first, 0)]
    inner, _ = _search(mine.cumsum(dim=1), rest)
    chosen = mine.gather(1, inner[:, None])[:, 0]
    tokens = index * block + inner
    if group is not None:
        found = torch.stack([torch.where(here, tokens, 0).float(), torch.where(here, chosen, 0.0)])
        dist.all_reduce(found, group=group)  # token ids are exact in fp32 below 2^24
        tokens = found[0].long()
        chosen = found[1]
    return tokens, chosen, total


def _search(running: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First column where a running sum [n, columns] exceeds the target [n]; what of it is left.

    >>> _search(torch.tensor([[1.0, 1.0, 4.0, 9.0]]), torch.tensor([3.0]))
    (tensor([2]), tensor([2.]))

    The target is kept below the total, so the column found always has a positive weight.
    """
    wanted = torch.minimum(target, running[:, -1] * BELOW_ONE)
    index = (running <= wanted[:, None]).sum(dim=1)
    index = index.clamp_(max=running.shape[1] - 1)
    before = torch.where(index > 0, running.gather(1, (index - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    return index, wanted - before


def _block_size(width: int, group: dist.ProcessGroup | None) -> int:
    if group is None:
        return MAX_BLOCK
    block = MAX_BLOCK
    while width % block:
        block //= 2
    return block


def _sample_filtered(
    logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the `top_k` largest logits, of these the fewest that hold `top_p` of the
    probability."""
    if group is not None:
        parts = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, logits, group=group)
        logits = torch.cat(parts, dim=1)
    logprobs = torch.log_softmax(logits, dim=-1)
    tokens, sure = _choose(logprobs, uniform, sampling, max(CANDIDATES, sampling.top_k + 1))
    if not sure.all():
        tokens[~sure], _ = _choose(logprobs[~sure], uniform[~sure], sampling, logprobs.shape[1])
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def _choose(
    logprobs: torch.Tensor, uniform: torch.Tensor, sampling: Sampling, candidates: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw by the filters among this many of the likeliest tokens, of equal ones first those with
    small ids.

    Returns the tokens [n], and where they are those that sorting the whole vocabulary would give,
    bool [n].
    """
    whole = candidates >= logprobs.shape[1]
    if whole:
        ordered, ids = logprobs.sort(dim=-1, descending=True, stable=True)
    else:
        ids = logprobs.topk(candidates, dim=-1).indices.sort(dim=-1).values
        ordered, places = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, places)
    weights = ordered.exp()
    held = torch.ones_like(weights[:, :1])
    if sampling.top_k > 0:
        weights[:, sampling.top_k :] = 0.0
        held = weights.cumsum(dim=-1)[:, -1:]
    if sampling.top_p < 1.0:  # a token stays while the ones before it hold less than top_p
        weights = weights * (weights.cumsum(dim=-1) - weights < sampling.top_p * held)
    ranks, _, _ = _invert(weights, uniform, None)
    # What stays must end before the last candidate: tokens as likely as that one may have been left
    # out.
    sure = whole | ~((weights > 0) & (ordered == ordered[:, -1:])).any(dim=-1)
    return ids.gather(1, ranks[:, None])[:, 0], sure
