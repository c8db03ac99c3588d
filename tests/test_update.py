"""Whole GRPO updates against a plain PyTorch step on transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import make_model
from multiproc import DEVICE, run_ranks
from test_observe import make_runtime
from test_parity import make_world

from r1zero.config.load import load_config
from r1zero.models.config import ModelConfig
from r1zero.models.params import param_table
from r1zero.policy.actor import Actor
from r1zero.policy.megatron import RoleModel
from r1zero.step import train_step
from r1zero.types import Batch, Group, Outcome, Prompt, Sample, Score
from r1zero.weight_sync.gather import gather_tensors

TEMPERATURE, KL, ENTROPY, LR, CLIP = 0.9, 0.07, 0.01, 2e-3, 0.1
# Adam divides by sqrt(v): with the usual eps, elements whose gradient is rounding noise would move
# by a full learning rate in a random direction. A large eps makes the update a smooth function of
# the
# gradient.
EPS = 1e-3
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
]
PROMPT_LENGTHS = [3, 12, 7, 1, 20, 5]


def make_groups(vocab: int = 512) -> list[Group]:
    """Six prompts of four responses with rewards; the third group has equal rewards."""
    random = np.random.default_rng(11)
    groups = []
    for position, length in enumerate(PROMPT_LENGTHS):
        prompt = Prompt(position, "", random.integers(3, vocab, length, dtype=np.int32), "")
        group = Group(position, prompt, [])
        for member in range(4):
            count = int(random.integers(1, 25))
            sample = Sample(
                random.integers(3, vocab, count, dtype=np.int32),
                random.normal(-3, 1, count).astype(np.float32),
                False,
                version=0,
            )
            sample.ref_logprobs = random.normal(-6, 0.5, count).astype(np.float32)
            sample.reward = 0.7 if position == 2 else float(random.choice([-0.5, 0.0, 1.0]))
            sample.scores = {"acc": Score(sample.reward, Outcome.RIGHT)}
            group.samples.append(sample)
        groups.append(group)
    return groups


def update_body(rank, size, store, folder, layout, overrides):
    """Three minibatches of two groups each; returns the stats and, on rank 0, the new weights."""
    cfg, _ = load_config("tiny", [*OVERRIDES, *overrides])
    world = make_world(rank, size, store, layout)
    shape = ModelConfig.from_folder(folder)
    recompute = cfg.actor_rollout.recompute_granularity == "full"
    model = RoleModel(
        shape, world.train, DEVICE, torch.float32, 128, cfg.training.sequence_parallel, recompute, 1
    )
    model.load(folder)
    policy = Actor(model, cfg, total_updates=3 * cfg.actor_rollout.ppo_epochs)
    groups = make_groups()
    batch = Batch(1, 0, [group.prompt for group in groups], 4, 8)
    policy.begin(batch)
    stats = []
    for epoch in range(cfg.actor_rollout.ppo_epochs):
        for m in range(3):
            arrived = [groups[p] for p in batch.arrivals(m)] if epoch == 0 else []
            stats.append(policy.update(batch, m, arrived, epoch))
    weights = {
        t.name: tensor.clone() for t, tensor in gather_tensors(world, shape, model.parameters())
    }
    losses = [
        (s.sums["loss"] / s.sums["tokens"], s.sums["kl"] / s.sums["tokens"], s.grad_norm)
        for s in stats
    ]
    return losses, weights


def plain_pytorch(model, epochs=1):
    """The same updates with transformers and torch.optim, one sequence at a time, written from the
    paper."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    no_decay = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=0.01), dict(params=no_decay, weight_decay=0.0)],
        lr=LR,
        betas=(0.9, 0.99),
        eps=EPS,
    )
    groups = make_groups()

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
        old = {id(s): look(g, s)[0] for g in groups for s in g.samples}
    losses = []
    for _ in range(epochs):
        for m in range(3):
            part = groups[2 * m : 2 * m + 2]
            total = sum(len(s.tokens) for g in part for s in g.samples)
            loss = kl_sum = 0.0
            for group in part:
                rewards = np.array([s.reward for s in group.samples])
                spread = rewards.std(ddof=1)
                for sample, reward in zip(group.samples, rewards):
                    advantage = (reward - rewards.mean()) / (spread + 1e-6) if spread else 0.0
                    logp, entropy = look(group, sample)
                    ratio = (logp - old[id(sample)]).exp()
                    surrogate = torch.minimum(
                        ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
                    )
                    d = torch.from_numpy(sample.ref_logprobs) - logp
                    # whose gradient is that of the KL; low_var_kl only gives its value
                    held = d.square() / 2
                    kl = held + ((d.exp() - d - 1).clamp(max=10) - held).detach()
                    kl_sum += kl.sum().item()
                    loss = loss + (-surrogate + KL * kl - ENTROPY * entropy).sum() / total
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            losses.append((loss.item(), kl_sum / total, norm.item()))
    return losses


def compare(model, found, weights, epochs=1, tolerance=1e-5):
    expected = plain_pytorch(model, epochs)
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-6)
    shape = ModelConfig.from_config(
        model.config.to_dict() | {"architectures": [type(model).__name__]}
    )
    state = model.state_dict()
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
    return merged.chunk(len(tensor.hf), dim=0)


@pytest.mark.parametrize(
    ("size", "layout", "overrides"),
    [
        (1, (1, 1), []),
        (1, (1, 1), ["actor_rollout.micro_batch_size=3"]),
        (1, (1, 1), ["actor_rollout.max_tokens_per_microbatch=40"]),
        (1, (1, 1), ["actor_rollout.recompute_granularity=full"]),
        (
            2,
            (2, 1),
            ["actor_rollout.recompute_granularity=full", "training.sequence_parallel=true"],
        ),
        (
            2,
            (2, 1),
            ["actor_rollout.tensor_model_parallel_size=2", "training.sequence_parallel=true"],
        ),
        (2, (1, 2), ["actor_rollout.micro_batch_size=2"]),
        (2, (1, 1), ["actor_rollout.micro_batch_size=1"]),
        (4, (2, 1), ["actor_rollout.micro_batch_size=2"]),
        (8, (2, 2), ["actor_rollout.max_tokens_per_microbatch=64"]),
    ],
)
def test_three_updates_equal_plain_pytorch(tmp_path, size, layout, overrides):
    model = make_model("qwen2", tmp_path)
    (losses, weights), *_ = run_ranks(update_body, size, str(tmp_path), layout, overrides)
    compare(model, losses, weights)


@pytest.mark.parametrize(
    ("family", "size", "layout"),
    [("qwen2_tied", 2, (1, 2)), ("qwen3", 2, (2, 1)), ("llama", 1, (1, 1))],
)
def test_other_families_learn_the_same(tmp_path, family, size, layout):
    model = make_model(family, tmp_path)
    (losses, weights), *_ = run_ranks(update_body, size, str(tmp_path), layout, [])
    compare(model, losses, weights)


def test_two_epochs_equal_plain_pytorch(tmp_path):
    model = make_model("qwen2", tmp_path)
    [(losses, weights)] = run_ranks(
        update_body, 1, str(tmp_path), (1, 1), ["actor_rollout.ppo_epochs=2"]
    )
    # Six updates amplify rounding: each starts from weights that already differ in the last place.
    compare(model, losses, weights, epochs=2, tolerance=2e-5)


def held_body(rank, size, store, folder, *overrides):
    """Eight steps of one update each; returns the KL of the last four by d^2 / 2, whatever
    estimator is told."""
    runtime = make_runtime(
        store,
        folder,
        "training.global_batch_size=8",
        "actor_rollout.lr_decay_style=constant",
        *overrides,
    )
    runtime.start()
    found = []
    for step in range(1, 9):
        samples = [sample for group in train_step(step, runtime).groups for sample in group.samples]
        d = np.concatenate([sample.logprobs - sample.ref_logprobs for sample in samples])
        found.append(float(np.mean(d**2) / 2))
        runtime.progress.advance(runtime.cfg.training.global_batch_size)
    return np.mean(found[4:])


@pytest.mark.parametrize("estimator", ["kl", "abs"])
def test_a_large_coefficient_holds_the_kl_of_a_run(tiny, tmp_path, estimator):
    free, held = (
        run_ranks(
            held_body,
            1,
            str(tmp_path / weight),
            f"algorithm.kl_penalty={estimator}",
            f"algorithm.kl_ctrl.kl_coef={weight}",
        )[0]
        for weight in ("0", "5")
    )
    assert free > 0.01 and held < 0.25 * free, (free, held)
