"""A policy update by the actor, and the same by a plain PyTorch step on transformers."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from support.models import file_tensors
from support.multiproc import DEVICE
from support.plain_advantages import SCORE_WEIGHTS, plain_advantages
from support.surrogates import CLIP, SURROGATES
from support.worlds import make_world

from r1zero.algo.dealing import Dealer, SampleTable
from r1zero.distributed.groups import Grid
from r1zero.models.config import ModelConfig
from r1zero.models.lora import adapter_params, lora_config
from r1zero.models.params import param_table
from r1zero.policy.actor import Actor
from r1zero.policy.actor_config import actor_config
from r1zero.policy.handover import Delivery
from r1zero.policy.lora import Adapters
from r1zero.policy.megatron import RoleModel
from r1zero.preflight.resolve import load_config
from r1zero.types import Batch, Group, Outcome, Prompt, Sample, Score, joined
from r1zero.weight_sync.gather import Assignment, gather_tensors

TEMPERATURE, KL, ENTROPY, LR = 0.9, 0.07, 0.01, 2e-3
# Adam divides by sqrt(v): with the usual eps, elements whose gradient is rounding noise would move
# by a full learning rate in a random direction. A large eps makes the update a smooth function of
# the
# gradient.
EPS = 1e-3
BUDGET = 32  # of a response, in tokens
OVERRIDES = [
    f"actor_rollout.temperature={TEMPERATURE}",
    f"algorithm.kl_ctrl.kl_coef={KL}",
    f"actor_rollout.entropy_coeff={ENTROPY}",
    f"actor_rollout.lr={LR}",
    f"actor_rollout.clip_ratio={CLIP}",
    f"actor_rollout.adam_eps={EPS}",
    "actor_rollout.lr_decay_style=constant",
    "actor_rollout.clip_grad=0.05",
    "actor_rollout.weight_decay=0.01",
    "actor_rollout.adam_beta2=0.99",
    "training.distributed_backend=gloo",
    "actor_rollout.n_samples_per_prompt=4",
    "actor_rollout.ppo_mini_batch_size=8",
    "training.global_batch_size=6",
    "algorithm.verifier_function=[acc, format]",
    f"algorithm.verifier_weight={SCORE_WEIGHTS.tolist()}",
    f"training.seq_length={20 + BUDGET}",
    "actor_rollout.max_prompt_length=20",
]
PROMPT_LENGTHS = [3, 12, 7, 1, 20, 5]


def make_groups(
    vocab: int = 512,
    masked: bool = False,
    resting: tuple[int, ...] = (),
    cut: tuple[int, ...] = (),
    drawn_at: float = -3,
) -> list[Group]:
    """Six prompts of four responses with rewards; the third group has equal rewards.

    With `masked` the loss leaves out every third token and the whole of one response; groups at the
    positions `resting` and the samples of the numbers `cut` do not train. The engine's log-probs lie around `drawn_at`.
    """
    random = np.random.default_rng(11)
    groups = []
    for position, length in enumerate(PROMPT_LENGTHS):
        prompt = Prompt(position, "", random.integers(3, vocab, length, dtype=np.int32), "")
        group = Group(position, prompt, [])
        for _ in range(4):
            count = int(random.integers(1, 25))
            sample = Sample(
                random.integers(3, vocab, count, dtype=np.int32),
                random.normal(drawn_at, 1, count).astype(np.float32),
                False,
                version=0,
            )
            sample.ref_logprobs = random.normal(-6, 0.5, count).astype(np.float32)
            sample.reward = 0.7 if position == 2 else float(random.choice([-0.5, 0.0, 1.0]))
            sample.scores = {"acc": Score(sample.reward, Outcome.RIGHT)}
            sample.right = sample.reward > 0.5
            sample.score_values = np.array([sample.reward, count % 3])
            group.samples.append(sample)
        for member, sample in enumerate(group.samples):
            sample.trains = position * 4 + member not in cut
        group.trains = position not in resting
        groups.append(group)
    if masked:
        for group in groups:
            for sample in group.samples:
                sample.loss_mask = np.arange(len(sample.tokens)) % 3 != 1
        groups[1].samples[2].loss_mask[:] = False
    return groups


def update_body(rank, size, store, folder, layout, overrides, chosen=(), plan=()):
    """Three minibatches of two groups each, unless the `plan` of the batch says otherwise; returns the
    stats and, on rank 0, the new weights, those of adapters by themselves beside the merged ones."""
    return updates(make_world(rank, size, store, layout), folder, overrides, chosen, plan)


def variants_body(rank, size, store, folder, layout, overrides, variants, chosen=(), plan=()):
    """The same once for each of these lists of further overrides, in one world."""
    world = make_world(rank, size, store, layout)
    return [updates(world, folder, [*overrides, *own], chosen, plan) for own in variants]


def cases_body(rank, size, store, folder, layout, cases):
    """The same for each of these pairs of overrides and what is chosen, in one world."""
    world = make_world(rank, size, store, layout)
    return [updates(world, folder, overrides, chosen, ()) for overrides, chosen in cases]


def updates(world, folder, overrides, chosen, plan):
    """The updates of `update_body`, from the weights in the folder."""
    policy, stats = taught(world, folder, overrides, chosen, plan)
    shape = policy.model.shape
    weights = {
        t.name: tensor.clone() for t, tensor in gather_tensors(world, shape, policy.parameters())
    }
    if policy.adapters is not None:
        lora = policy.adapters.config
        plan = [Assignment(spec, 0, 0) for spec in adapter_params(shape, lora)]
        for spec, tensor in gather_tensors(world, shape, policy.adapters.parameters(), plan):
            weights[spec.name] = tensor.clone()
    losses = [(joined([s], "loss"), joined([s], "kl"), s.grad_norm) for s in stats if s is not None]
    return losses, weights


def taught(world, folder, overrides, chosen=(), plan=(), dtype=torch.float32):
    """The actor after these updates, and what each told."""
    cfg, _ = load_config("tiny", [*OVERRIDES, *overrides])
    shape = ModelConfig.from_folder(folder)
    recompute = cfg.actor_rollout.recompute_granularity == "full"
    model = RoleModel(
        shape, world.train, DEVICE, dtype, 128, cfg.training.sequence_parallel, recompute, 1
    )
    model.load(folder)
    lora = lora_config(cfg.actor_rollout)
    adapters = Adapters(model, lora, seed=1) if lora else None
    policy = Actor(model, actor_config(cfg, 3 * cfg.actor_rollout.ppo_epochs), adapters)
    groups = make_groups(**dict(chosen))
    batch = replace(Batch(1, 0, [group.prompt for group in groups], 4, 8), **dict(plan))
    policy.begin(batch)
    stats = []
    for delivery in deliveries(batch, groups, world.train):
        stats += policy.learn(delivery)
    for epoch in range(1, cfg.actor_rollout.ppo_epochs):
        stats += policy.learn_again(epoch)
    return policy, stats


def deliveries(batch: Batch, groups: list[Group], grid: Grid) -> list[Delivery]:
    """What this train rank is given of a batch, part by part."""
    size = batch.samples_per_prompt
    dealer = Dealer(batch, grid.span.dp)
    found = []
    for part in batch.parts:
        arrived = [group for group in groups if group.longest in part.lengths]
        for deal in dealer.add(SampleTable.of(arrived, size)):
            mine = deal.shares[grid.replica]
            found.append(Delivery(deal, {n: groups[n // size].samples[n % size] for n in mine}))
    return found


def plain_weight(aggregation, sample, group, update):
    """What a token of a sample weighs in the loss of an update with these groups, of which some may
    not train."""
    tokens = {id(s): int(s.mask.sum()) for g in update for s in g.samples}
    own_group = sum(tokens[id(s)] for s in group.samples)
    responses = len(tokens)
    return {
        "token_mean": 1 / sum(tokens.values()),
        "sequence_mean": 1 / responses / tokens[id(sample)],
        "sequence_sum": 1 / responses,
        "constant": 1 / responses / BUDGET,
        "group_token_mean": 1 / len(update) / own_group,
        "square_root": 1 / responses / tokens[id(sample)] ** 0.5,
    }[aggregation]


def plain_pytorch(
    model,
    epochs=1,
    loss_name="grpo",
    aggregation="token_mean",
    advantage="group_norm",
    chosen=(),
    prompts=2,
    engine=False,
    weigh=None,
    kl_in="loss",
):
    """The same updates with transformers and torch.optim, one sequence at a time, written from the
    papers.

    Each of so many prompts; old log-probs are the engine's, if asked for; `weigh` gives the weights of
    a response's policy loss from its log p_old - log p_rollout.
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=0.01), dict(params=no_decay, weight_decay=0.0)],
        lr=LR,
        betas=(0.9, 0.99),
        eps=EPS,
    )
    groups = make_groups(**dict(chosen))

    def look(group, sample):
        tokens = torch.tensor(
            np.concatenate([group.prompt.tokens, sample.tokens]), dtype=torch.int64
        )
        logits = model(tokens[None]).logits[0, len(group.prompt.tokens) - 1 : -1] / TEMPERATURE
        logp = torch.log_softmax(logits, -1)
        return logp.gather(1, tokens[len(group.prompt.tokens) :, None])[:, 0], -(
            logp.exp() * logp
        ).sum(-1)

    with torch.no_grad():
        start = {id(s): look(g, s)[0] for g in groups for s in g.samples}
    drawn = {id(s): torch.from_numpy(s.logprobs) for g in groups for s in g.samples}
    old = drawn if engine else start
    losses = []
    for _ in range(epochs):
        for first in range(0, len(groups), prompts):
            everything = groups[first : first + prompts]
            part = [group for group in everything if group.training]
            if not part:
                continue
            total = sum(s.mask.sum() for g in part for s in g.training)
            advantages = plain_advantages(advantage, everything)
            loss = kl_sum = told = 0.0
            for group in part:
                for sample in group.samples:
                    if not sample.trains or not sample.mask.any():
                        continue
                    mask = torch.from_numpy(sample.mask)
                    logp, entropy = (values[mask] for values in look(group, sample))
                    d = torch.from_numpy(sample.ref_logprobs)[mask] - logp
                    of_sample = advantages[id(sample)]
                    if kl_in == "reward":
                        of_sample = of_sample + KL * d.detach()
                    surrogate = SURROGATES[loss_name](logp, old[id(sample)][mask], of_sample)
                    # whose gradient is that of the KL; low_var_kl only gives its value
                    held = d.square() / 2
                    kl = held + ((d.exp() - d - 1).clamp(max=10) - held).detach()
                    kl_sum += kl.sum().item()
                    if weigh is not None:
                        log_weights = (start[id(sample)] - drawn[id(sample)])[mask]
                        surrogate = weigh(log_weights) * surrogate
                    kl_term = KL * kl if kl_in == "loss" else 0.0
                    of_tokens = -surrogate + kl_term - ENTROPY * entropy
                    told += of_tokens.sum().item() / total
                    loss = loss + of_tokens.sum() * plain_weight(
                        aggregation, sample, group, everything
                    )
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            losses.append((told, kl_sum / total, norm.item()))
    return losses


PLAINLY_TAUGHT = {}  # the same on every layout


def plainly_taught(model, epochs, objective):
    """What `plain_pytorch` tells of its updates, and the weights after them, by the names of a file:
    computed once for the same weights and the same objective."""
    told = f"{type(model).__name__} {model.config.to_json_string()} {epochs} {objective}"
    start = hashlib.sha256(told.encode())
    for name, value in model.state_dict().items():
        start.update(name.encode() + value.numpy().tobytes())
    key = start.digest()
    if key not in PLAINLY_TAUGHT:
        losses = plain_pytorch(model, epochs, **objective)
        PLAINLY_TAUGHT[key] = losses, file_tensors(model.state_dict())
    return PLAINLY_TAUGHT[key]


def compare(model, found, weights, epochs=1, tolerance=1e-5, **objective):
    expected, state = plainly_taught(model, epochs, objective)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-6)
    shape = ModelConfig.from_config(
        model.config.to_dict() | {"architectures": [type(model).__name__]}
    )
    for tensor in param_table(shape):
        new = to_hf(tensor, weights[tensor.name])
        for name, value in zip(tensor.hf, new, strict=True):
            error = (value - state[name]).norm() / state[name].norm()
            assert error < tolerance, f"{name} differs by {error:.1e} of its norm"


def to_hf(tensor, merged):
    """Undo Megatron's fusion by hand: the check must not go through the table's own inverse."""
    if tensor.kv_groups:
        heads = merged.view(tensor.kv_groups, -1, *merged.shape[1:])
        size = tensor.hf_shape[1][0] // tensor.kv_groups
        parts = heads.split([heads.shape[1] - 2 * size, size, size], dim=1)
        return [part.reshape(-1, *merged.shape[1:]) for part in parts]
    if tensor.cut == "experts":
        merged = merged.flatten(
            0, 1
        )  # gate, up, gate, up ... or down, down ..., one below the other
    return merged.chunk(len(tensor.hf), dim=0)
