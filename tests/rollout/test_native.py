"""The CPU's own kernels against PyTorch's operators: every one, both types, sizes that do not fill
a vector."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.patience import LONG
from support.shapes import small_shape

from r1zero.models.config import Latent
from r1zero.ops import compiled
from r1zero.rollout import native
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.linear import Linear
from r1zero.rollout.operators import Heads, Operators
from r1zero.rollout.sampler import Sampling

# fp32: sums of a few hundred products in another order. bf16: PyTorch rounds several times where we
# round once.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
CPU = torch.device("cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def library():
    found, reason = compiled.load(native.SOURCE)
    # without one there are no kernels, and PyTorch's operators are tested
    if reason.startswith("no C++ compiler"):
        pytest.skip(reason)
    assert found is not None, reason
    return found


def both(library, dtype, kv_heads=2, per_group=3, dim=24):
    torch.manual_seed(0)
    angles = torch.rand(200, dim // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    heads = Heads(kv_heads, per_group, dim, 1e-6, dim**-0.5, cos, sin)
    return native.NativeOperators(heads, library), Operators(heads)


@pytest.mark.parametrize("width", [1, 16, 67, 576])
def test_add_norm(library, dtype, width):
    ours, theirs = both(library, dtype)
    hidden, delta, weight = (
        torch.randn(5, width).to(dtype),
        torch.randn(5, width).to(dtype),
        torch.rand(width).to(dtype),
    )
    for change in (None, delta):
        mine, other = hidden.clone(), hidden.clone()
        found, mine = ours.add_norm(mine, change, weight)
        expected, other = theirs.add_norm(other, change, weight)
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
        torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("width", [1, 16, 67, 1536])
def test_silu_mul(library, dtype, width):
    ours, theirs = both(library, dtype)
    x = torch.randn(5, 2 * width) * 4
    x[0, :width], x[1, :width], x[2, :width] = -200, 200, torch.linspace(-90, 90, width)
    x = x.to(dtype)
    torch.testing.assert_close(
        ours.silu_mul(x), theirs.silu_mul(x), rtol=TOLERANCE[dtype], atol=1e-6
    )


def attend(operators, dtype, block, heads, normed, lengths=(5, 1, 32, 90, 64, 17)):
    """Attention of six samples of three prompts: two share prompt blocks; returns the output and
    the cache."""
    torch.manual_seed(1)
    shape = small_shape(
        num_layers=1,
        num_heads=heads.kv_heads * heads.per_group,
        num_kv_heads=heads.kv_heads,
        head_dim=heads.dim,
    )
    pool = BlockPool(shape, heads.kv_heads, dtype, CPU, block)
    pool.reserve(300)
    keys = torch.randn(6, 1, heads.kv_heads, 128, heads.dim).to(dtype)
    values = torch.randn_like(keys)
    keys[1], values[1] = keys[0], values[0]  # one prompt
    prompt = 2 * (4 // block) if block <= 4 else 0
    rows = []
    for number, length in enumerate(lengths):
        if number == 1:
            shared = rows[0].shared[: length // block]
        else:
            shared = pool.take_shared(min(prompt, length // block))
        own = pool.take_own(length // block + 1 - len(shared))
        pool.write(
            (shared + own)[: -(-length // block)],
            keys[number, :, :, :length],
            values[number, :, :, :length],
        )
        rows.append(SampleBlocks(0 if number < 2 else number, shared, own))
    step = DecodeStep(
        DecodeLayout(rows, pool, 2, heads.kv_heads * heads.per_group, CPU), np.array(lengths)
    )
    qkv = torch.randn(6, heads.kv_heads * (heads.per_group + 2) * heads.dim).to(dtype)
    norms = [torch.rand(heads.dim).to(dtype) + 0.5 for _ in range(2)] if normed else [None, None]
    found = operators.decoding(step)(0, qkv.clone(), *norms)
    return found, pool.keys.clone(), pool.values.clone()


@pytest.mark.parametrize(
    ("kv_heads", "per_group", "dim", "block", "normed"),
    [
        (2, 3, 24, 4, False),
        (1, 1, 16, 1, True),
        (3, 3, 64, 64, False),
        (2, 7, 64, 64, False),
        (1, 8, 128, 16, True),
        (2, 2, 20, 5, True),
        (1, 5, 80, 33, False),
    ],
)
def test_attention(library, dtype, kv_heads, per_group, dim, block, normed):
    ours, theirs = both(library, dtype, kv_heads, per_group, dim)
    found, expected = (attend(x, dtype, block, x.heads, normed) for x in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_attention_is_the_same_bit_for_bit_for_any_block_size_and_any_threads(library, dtype):
    ours, _ = both(library, dtype, 2, 3, 64)
    expected, *_ = attend(ours, dtype, 64, ours.heads, False)
    threads = torch.get_num_threads()
    try:
        for block, count in ((1, 1), (16, 2), (33, 3), (128, 2)):
            torch.set_num_threads(count)
            found, *_ = attend(ours, dtype, block, ours.heads, False)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


def latent_operators(library, dtype, heads, rank, rope):
    """The kernels and PyTorch's operators of a model with latent attention."""
    torch.manual_seed(0)
    sizes = Latent(query_latent=None, rank=rank, nope_dim=24, rope_dim=rope, value_dim=20)
    angles = torch.rand(200, rope // 2) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    made = Heads(1, heads, sizes.query_dim, 1e-6, 0.2, cos, sin, sizes)
    return native.NativeOperators(made, library), Operators(made)


def attend_latent(operators, dtype, block, lengths=(5, 1, 32, 90, 64, 17)):
    """Latent attention of six samples, two of which share prompt blocks; the output and the cache."""
    torch.manual_seed(1)
    heads = operators.heads.per_group
    sizes = operators.latent
    shape = small_shape(num_layers=1, num_heads=heads, latent=sizes)
    pool = BlockPool(shape, 1, dtype, CPU, block)
    pool.reserve(300)
    keys = torch.randn(6, 1, 1, 128, sizes.rope_dim).to(dtype)
    latents = torch.randn(6, 1, 1, 128, sizes.rank).to(dtype)
    keys[1] = keys[0]
    latents[1] = latents[0]
    rows = []
    for number, length in enumerate(lengths):
        shared = []
        if number == 0:
            shared = pool.take_shared(4 // block)
        elif number == 1:
            shared = rows[0].shared[: length // block]
        own = pool.take_own(length // block + 1 - len(shared))
        blocks = (shared + own)[: -(-length // block)]
        pool.write(blocks, keys[number, :, :, :length], latents[number, :, :, :length])
        rows.append(SampleBlocks(0 if number < 2 else number, shared, own))
    step = DecodeStep(DecodeLayout(rows, pool, 2, heads, CPU), np.array(lengths))
    query = torch.randn(6, heads * sizes.query_dim).to(dtype)
    latent = torch.randn(6, sizes.rank).to(dtype)
    key = torch.randn(6, sizes.rope_dim).to(dtype)
    up = Linear(torch.randn(heads * 44, sizes.rank).mul(sizes.rank**-0.5).to(dtype))
    found = operators.decoding_latent(step)(0, query, latent, key, up)
    return found, pool.keys.clone(), pool.values.clone()


@pytest.mark.parametrize(
    ("heads", "rank", "rope", "block"),
    [(1, 16, 8, 1), (4, 32, 16, 4), (16, 512, 64, 64), (22, 67, 10, 5), (7, 40, 20, 33)],
)
def test_latent_attention(library, dtype, heads, rank, rope, block):
    ours, theirs = latent_operators(library, dtype, heads, rank, rope)
    found, expected = (attend_latent(x, dtype, block) for x in (ours, theirs))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_latent_attention_is_the_same_bit_for_bit_for_any_block_size(library, dtype):
    ours, _ = latent_operators(library, dtype, 18, 48, 16)
    expected, *_ = attend_latent(ours, dtype, 64)
    for block in (1, 16, 33, 128):
        found, *_ = attend_latent(ours, dtype, block)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("vocab", [1, 7, 128, 300, 49152])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_draw(library, dtype, vocab, temperature):
    ours, theirs = both(library, dtype)
    torch.manual_seed(3)
    logits, uniform = (torch.randn(200, vocab) * 3).to(dtype), torch.rand(200)
    uniform[0], uniform[1] = 0.0, 1 - 2**-24
    found, expected = (
        x.sample(logits.clone(), uniform, Sampling(temperature, 1.0, 0, 0), None)
        for x in (ours, theirs)
    )
    # The uniform falls between two tokens within rounding of the sums once in some ten thousand
    # draws.
    same = found[0] == expected[0]
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(found[1][same], expected[1][same], rtol=0, atol=2e-5)
    exact = torch.log_softmax(logits.double() / temperature, dim=-1).gather(1, found[0][:, None])[
        :, 0
    ]
    torch.testing.assert_close(found[1].double(), exact, rtol=0, atol=2e-5)


def test_a_token_without_probability_is_never_drawn(library, dtype):
    ours, _ = both(library, dtype)
    logits = torch.full((400, 300), -torch.inf)
    logits[:, [7, 130, 255]] = torch.tensor([0.0, 1.0, -1.0])
    uniform = torch.linspace(0, 1 - 2**-24, 400)
    tokens, logprobs = ours.sample(logits.to(dtype), uniform, Sampling(1.0, 1.0, 0, 0), None)
    assert set(tokens.tolist()) == {7, 130, 255} and logprobs.isfinite().all()
    assert (tokens.diff() >= 0).all(), "the inverse of a distribution function does not fall"


def test_not_a_number_stays_one(library, dtype):
    ours, _ = both(library, dtype)
    hidden = torch.randn(2, 40).to(dtype)
    hidden[1, 3] = torch.nan
    normed, _ = ours.add_norm(hidden, None, torch.ones(40, dtype=dtype))
    assert normed[0].isfinite().all() and normed[1].isnan().all()
    logits = torch.randn(1, 300).to(dtype)
    logits[0, 200] = torch.nan
    assert ours.sample(logits, torch.tensor([0.5]), Sampling(1.0, 1.0, 0, 0), None)[1].isnan().all()


def test_without_a_compiler_pytorch_computes_and_the_reason_is_said(tmp_path):
    code = (
        "from r1zero.ops import compiled; from r1zero.rollout import native; "
        "print(compiled.load(native.SOURCE))"
    )
    environment = {
        **os.environ,
        "PATH": "",
        "HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "no C++ compiler" in done.stdout and done.stdout.startswith("(None")


def test_a_user_without_a_home_folder_gets_the_reason_too(monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    found, reason = compiled.load.__wrapped__(native.SOURCE)
    assert found is None and "home directory" in reason


def test_of_processes_that_start_together_one_compiles(tmp_path):
    """Sixty compilers at once would take all memory of a machine."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        f"echo call >> {tmp_path}/calls\n"
        'sleep 0.3; while [ "$1" != -o ]; do shift; done; touch "$2"\n'
    )
    compiler.chmod(0o755)
    library = tmp_path / "cache" / "kernels.so"
    code = (
        "import sys; from pathlib import Path; from r1zero.ops import compiled; "
        "compiled.compile_once(sys.argv[1], Path(), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(compiler), str(library)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    together = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [process.wait(timeout=LONG) for process in together] == [0] * 4
    calls = (tmp_path / "calls").read_text().splitlines()
    assert library.is_file() and len(calls) == 2, "one compiles and links, the others wait for it"
