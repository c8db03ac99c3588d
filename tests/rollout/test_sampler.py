"""Drawing tokens: the distribution, the filters, and independence of how the vocabulary is cut."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.multiproc import run_ranks
from support.patience import LONG

from r1zero.rollout import sampler
from r1zero.rollout.sampler import Sampling, sample, uniforms


def sample_all(logits, sampling, seed=0, group=None):
    uniform = torch.from_numpy(np.random.default_rng(seed).random(len(logits), dtype=np.float32))
    return sample(logits.clone(), uniform, sampling, group)


def chi_square(counts, expected):
    kept = expected > 5
    return float((((counts - expected) ** 2)[kept] / expected[kept]).sum()), int(kept.sum()) - 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("vocab", [7, 300, 1000])
def test_tokens_follow_the_softmax(vocab, temperature):
    torch.manual_seed(1)
    row, count = torch.randn(vocab) * 2, 40000
    tokens, logprobs = sample_all(row.expand(count, -1), Sampling(temperature, 1.0, 0, 0))
    expected = torch.softmax(row.double() / temperature, -1)
    statistic, freedom = chi_square(
        torch.bincount(tokens, minlength=vocab).double(), expected * count
    )
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], rtol=0, atol=2e-5)


def test_a_token_without_probability_is_never_drawn():
    row = torch.full((200,), -torch.inf)
    row[[3, 150]] = torch.tensor([0.0, -30.0])
    for u in (0.0, 0.5, 1 - 2**-24):
        token, _ = sample(row[None].clone(), torch.tensor([u]), Sampling(1.0, 1.0, 0, 0), None)
        assert token.item() in (3, 150)


def test_top_k_and_top_p_cut_the_tail_and_leave_the_log_prob_alone():
    # ids: 1 is the likeliest, then 3, 0, 4, 2
    row = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]).log()[[2, 0, 4, 1, 3]]
    many = row.expand(20000, -1)
    for sampling, allowed in (
        (Sampling(1.0, 1.0, 2, 0), {1, 3}),
        (Sampling(1.0, 0.69, 0, 0), {1, 3}),
        (Sampling(1.0, 0.71, 0, 0), {0, 1, 3}),
        (Sampling(1.0, 0.01, 0, 0), {1}),
        (Sampling(1.0, 0.99, 3, 0), {0, 1, 3}),
    ):
        tokens, logprobs = sample_all(many, sampling)
        assert set(tokens.tolist()) == allowed, sampling
        torch.testing.assert_close(logprobs, row[tokens], rtol=0, atol=1e-6)
        kept = row.exp() * torch.tensor([float(i in allowed) for i in range(5)])
        shares = torch.bincount(tokens, minlength=5) / len(tokens)
        torch.testing.assert_close(shares, kept / kept.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (50, 0.9), (0, 0.95), (0, 0.3), (256, 1.0), (300, 0.99)]
)
def test_the_filters_draw_what_sorting_the_whole_vocabulary_gives(monkeypatch, top_k, top_p):
    """Flat rows beside steep ones, and logits in eighths, so that many are equal."""
    torch.manual_seed(4)
    logits = (torch.randn(300, 1000) * torch.linspace(0, 6, 300)[:, None] * 8).round() / 8
    sampling = Sampling(1.0, top_p, top_k, 0)
    tokens, _ = sample_all(logits, sampling)
    monkeypatch.setattr(sampler, "CANDIDATES", 1000)
    assert (tokens == sample_all(logits, sampling)[0]).all()
    if top_k == 1:
        assert (tokens == logits.argmax(dim=-1)).all()


def test_uniforms_depend_on_their_key_only():
    base = uniforms(7, 3, 2, 1, 50)
    assert (uniforms(7, 3, 2, 1, 20) == base[:20]).all()
    assert base.min() >= 0 and base.max() < 1
    for other in (
        (8, 3, 2, 1),
        (7, 4, 2, 1),
        (7, 3, 3, 1),
        (7, 3, 2, 0),
        (3, 7, 2, 1),
        (7, 3, 1, 2),
    ):
        assert not np.isin(uniforms(*other, 50), base).any()


def cut_body(rank, size, store, logits, sampling):
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LONG)
    )
    return sample_all(
        logits.chunk(size, dim=1)[rank].contiguous(), sampling, group=dist.group.WORLD
    )


@pytest.mark.parametrize("sampling", [Sampling(0.9, 1.0, 0, 0), Sampling(0.9, 0.8, 20, 0)])
@pytest.mark.parametrize("size", [2, 4])
def test_a_cut_vocabulary_draws_the_same(size, sampling):
    torch.manual_seed(2)
    logits = torch.randn(64, 4 * 96) * 3
    expected = sample_all(logits, sampling)
    for found in run_ranks(cut_body, size, logits, sampling):
        assert (found[0] == expected[0]).all()
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)
