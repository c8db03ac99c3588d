"""Item `operators`: what the program's operators compute on the device, against fp32 on the CPU.

An operator may be as far from the truth as twice the error that plain PyTorch in bf16 makes on the
same inputs: it rounds after every step, a fused kernel at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from npu_checks import reference
from npu_checks.check import Check, CheckFailed, Figures
from npu_checks.world import set_variables
from r1zero.distributed import device as devices
from r1zero.models.config import Latent, ModelConfig
from r1zero.models.family import LocalExperts
from r1zero.models.rotary import rotary_tables
from r1zero.ops.attention import Segments, packed_causal_attention
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.linear import Linear
from r1zero.rollout.native import operators
from r1zero.rollout.operators import Heads, Operators

TIMES = 2.0  # the error of plain bf16 that is allowed
ROUNDING = 2.0**-9  # of a result to bf16: what plain bf16 is credited with in any case
LENGTHS = (1, 127, 128, 129, 4096)  # around the size of a block, and a long one
SMALL_LENGTHS = (1, 127, 128, 129, 300)
EPS = 1e-6
THETA = 1e6
# Of DeepSeek-V3; and heads of a rank, of which 20 are padded to 32.
LATENT = Latent(query_latent=None, rank=512, nope_dim=128, rope_dim=64, value_dim=128)
LATENT_HEADS = (16, 20)
SMALL_LATENT_HEADS = (2, 3)

Results = list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Model:
    """Heads of a model; seven query heads share a kv head, as in Qwen2.5."""

    dim: int
    kv_heads: int
    per_group: int = 7

    @property
    def heads(self) -> int:
        return self.kv_heads * self.per_group

    def config(self, positions: int) -> ModelConfig:
        """One layer with these heads."""
        return ModelConfig.from_config(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "hidden_size": self.heads * self.dim,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "vocab_size": 64,
                "max_position_embeddings": positions,
                "rms_norm_eps": EPS,
                "rope_theta": THETA,
                "tie_word_embeddings": True,
            }
        )


@dataclass(frozen=True, slots=True)
class Case:
    """An operator on fixed inputs: `ours` on the device, `plain` on the CPU in a given type."""

    name: str
    ours: Callable[[], Results]
    plain: Callable[[torch.dtype], Results]


@dataclass(frozen=True, slots=True)
class Error:
    """How far an operator is from the truth, and plain bf16 from it, as relative errors of the
    worst row."""

    name: str
    ours: float
    plain: float

    @property
    def share(self) -> float:
        """What of the allowed error is used."""
        return self.ours / (TIMES * self.plain)


def run(check: Check) -> Figures:
    """Compare every operator; all that are wrong are named."""
    set_variables()
    device = devices.prepare("npu", 0).torch
    torch.manual_seed(0)
    errors = [measure(case) for case in cases(device, check.small)]
    wrong = [error for error in errors if not error.share <= 1.0]  # not a number is wrong, too
    if wrong:
        raise CheckFailed(
            "; ".join(
                f"{error.name} is off by {error.ours:.2g} where plain bf16 is by {error.plain:.2g}"
                for error in wrong
            ),
            "these kernels do not compute what their documentation says: send us the JSON with the "
            "versions of CANN and the driver, and train nothing with them",
        )
    worst = max(errors, key=lambda error: error.share)
    values = {error.name: {"error": error.ours, "plain_bf16": error.plain} for error in errors}
    return Figures(
        f"{len(errors)} results within twice the error of plain bf16; nearest to it {worst.name}: "
        f"{worst.ours:.2g}, plain bf16 {worst.plain:.2g}",
        values,
    )


def measure(case: Case) -> Error:
    """The largest errors of an operator's results."""
    truth = case.plain(torch.float32)
    plain = case.plain(torch.bfloat16)
    ours = case.ours()
    assert len(ours) == len(truth) == len(plain)
    off = [reference.distance(found, right) for found, right in zip(ours, truth, strict=True)]
    rounded = []
    for found, right in zip(plain, truth, strict=True):
        rounded.append(max(ROUNDING, reference.distance(found, right)))
    shares = [mine / its for mine, its in zip(off, rounded, strict=True)]
    worst = int(np.argmax(shares))  # of numbers and nan the nan
    return Error(case.name, off[worst], rounded[worst])


def cases(device: torch.device, small: bool) -> Iterator[Case]:
    """Every operator of training and of decoding."""
    for dim, kv_heads in ((64, 2), (128, 4)):
        model = Model(dim, 1 if small else kv_heads)
        size = f"head size {dim}"
        yield training_attention(f"training attention, {size}", model, device, prefixes(small))
        yield training_attention(f"many sequences, {size}", model, device, many(small))
        yield decode_attention(
            f"decode attention, {size}", model, device, SMALL_LENGTHS if small else LENGTHS
        )
        yield rotary(f"rotary, {size}", model, device)
    for heads in SMALL_LATENT_HEADS if small else LATENT_HEADS:
        yield latent_attention(
            f"attention to latents, {heads} heads",
            heads,
            device,
            SMALL_LENGTHS if small else LENGTHS,
        )
    width = 256 if small else 3584
    yield norm("RMSNorm", width, device, add=False)
    yield norm("add and RMSNorm", width, device, add=True)
    yield activation("SwiGLU", width, device)
    for held in ((0, 8), (2, 6)):
        for tokens in (16, 600):
            yield mixture(
                f"experts {held[0]} to {held[1] - 1} of 8, {tokens} tokens", held, tokens, device
            )


def random(*shape: int) -> torch.Tensor:
    """Numbers that bf16 holds, on the CPU."""
    return torch.randn(*shape).bfloat16()


# -- training -------------------------------------------------------------------------------------


def prefixes(small: bool) -> list[tuple[range, list[int]]]:
    """Two prompts with their responses, each response seeing its prompt: queries and keys."""
    scale = 1 if small else 4
    segments: list[tuple[range, list[int]]] = []
    first = 0
    for prompt_length, lengths in ((30 * scale, (17, 1, 64)), (129, (128, 33 * scale))):
        prompt = range(first, first + prompt_length)
        segments.append((prompt, list(prompt)))
        first = prompt.stop
        for length in lengths:
            response = range(first, first + length)
            segments.append((response, [*prompt, *response]))
            first = response.stop
    return segments


def many(small: bool) -> list[tuple[range, list[int]]]:
    """As many short sequences as one call may have."""
    segments = []
    first = 0
    for number in range(40 if small else 2048):
        queries = range(first, first + 1 + number % 3)
        segments.append((queries, list(queries)))
        first = queries.stop
    return segments


def training_attention(
    name: str, model: Model, device: torch.device, segments: list[tuple[range, list[int]]]
) -> Case:
    """Attention over packed segments, and its gradients for query, key and value."""
    tokens = segments[-1][0].stop
    inputs = [
        random(tokens, model.heads, model.dim),
        random(tokens, model.kv_heads, model.dim),
        random(tokens, model.kv_heads, model.dim),
    ]
    push = random(tokens, model.heads, model.dim)  # the gradient of the output
    rows: list[int] = []
    query_ends = []
    key_ends = []
    for queries, keys in segments:
        rows += keys
        query_ends.append(queries.stop)
        key_ends.append(len(rows))
    packed = Segments(query_ends, key_ends, torch.tensor(rows, device=device))

    def ours() -> Results:
        leaves = [x.to(device).requires_grad_() for x in inputs]
        query, key, value = leaves
        output = packed_causal_attention(query, key, value, packed, model.dim**-0.5)
        output.backward(push.to(device))
        return [output, *gradients(leaves)]

    def plain(dtype: torch.dtype) -> Results:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        query, key, value = leaves
        output = reference.attend_packed(query, key, value, segments)
        output.backward(push.to(dtype))
        return [output.detach(), *gradients(leaves)]

    return Case(name, ours, plain)


def gradients(leaves: Sequence[torch.Tensor]) -> Results:
    """What a backward pass has left."""
    found = []
    for leaf in leaves:
        assert leaf.grad is not None
        found.append(leaf.grad)
    return found


# -- decoding -------------------------------------------------------------------------------------


def decoder_operators(model: Model, device: torch.device, positions: int) -> Operators:
    """The decoder's operators on a device, for bf16."""
    cos, sin = rotary_tables(model.config(positions), positions, device)
    return operators(
        Heads(
            model.kv_heads,
            model.per_group,
            model.dim,
            EPS,
            model.dim**-0.5,
            cos.bfloat16(),
            sin.bfloat16(),
        )
    )


def parted(model: Model, qkv: torch.Tensor) -> Results:
    """Queries [T, heads, D], keys and values [T, kv heads, D] of a fused product."""
    x = qkv.view(len(qkv), model.kv_heads, model.per_group + 2, model.dim)
    return [x[:, :, :-2].flatten(1, 2), x[:, :, -2], x[:, :, -1]]


def tables(
    positions: torch.Tensor, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, 1, D], which are bf16 numbers in any type."""
    angles = reference.rotary_angles(positions, dim, THETA)[:, None]
    return angles.cos().bfloat16().to(dtype), angles.sin().bfloat16().to(dtype)


def rotary(name: str, model: Model, device: torch.device) -> Case:
    """Queries and keys of a fused product, turned by their positions."""
    positions = torch.tensor([0, 1, 5, 1000, 4095])
    qkv = random(len(positions), model.kv_heads * (model.per_group + 2) * model.dim)

    def ours() -> Results:
        kernels = decoder_operators(model, device, 4096)
        rows = kernels.rotary(positions.to(device))
        return list(kernels.split_qkv_rope(qkv.to(device), None, None, rows))

    def plain(dtype: torch.dtype) -> Results:
        query, key, value = parted(model, qkv.to(dtype))
        cos, sin = tables(positions, model.dim, dtype)
        return [
            reference.rotate_half(query, cos, sin),
            reference.rotate_half(key, cos, sin),
            value,
        ]

    return Case(name, ours, plain)


def decode_attention(name: str, model: Model, device: torch.device, lengths: Sequence[int]) -> Case:
    """One new token of rows of these lengths, their blocks lying anywhere in the cache."""
    shape = model.config(max(lengths))
    qkv = random(len(lengths), model.kv_heads * (model.per_group + 2) * model.dim)
    positions = torch.tensor(lengths) - 1
    cached = []
    for length in lengths:
        size = (2, model.kv_heads, length - 1, model.dim)
        cached.append(random(*size))

    def ours() -> Results:
        kernels = decoder_operators(model, device, max(lengths))
        pool = BlockPool(
            shape, model.kv_heads, torch.bfloat16, device, token_major=kernels.token_major
        )
        rows = shuffled_blocks(lengths, pool)
        for row, (keys, values) in zip(rows, cached, strict=True):
            pool.write(row.own, keys[None].to(device), values[None].to(device))
        layout = DecodeLayout(rows, pool, 1, model.heads, device)
        step = DecodeStep(layout, positions.numpy())
        output = kernels.decoding(step)(0, qkv.to(device), None, None)
        return [output.view(len(lengths), model.heads, model.dim)]

    def plain(dtype: torch.dtype) -> Results:
        query, key, value = parted(model, qkv.to(dtype))
        cos, sin = tables(positions, model.dim, dtype)
        query = reference.rotate_half(query, cos, sin)
        key = reference.rotate_half(key, cos, sin)
        outputs = []
        for row, before in enumerate(cached):
            keys, values = before.to(dtype).transpose(1, 2)
            all_keys = torch.cat([keys, key[row : row + 1]])
            all_values = torch.cat([values, value[row : row + 1]])
            outputs.append(reference.attend(query[row : row + 1], all_keys, all_values, None))
        return [torch.cat(outputs)]

    return Case(name, ours, plain)


def latent_attention(name: str, heads: int, device: torch.device, lengths: Sequence[int]) -> Case:
    """The same of latent attention, against keys and values that are made of all latents."""
    shape = replace(Model(64, 1).config(max(lengths)), latent=LATENT)
    count = len(lengths)
    query = random(count, heads, LATENT.query_dim)
    up = random(heads * (LATENT.nope_dim + LATENT.value_dim), LATENT.rank) / 16
    positions = torch.tensor(lengths) - 1
    latents = [random(length, LATENT.rank) for length in lengths]  # the last one is the new token's
    keys = [random(length, LATENT.rope_dim) for length in lengths]

    def ours() -> Results:
        cos, sin = rotary_tables(shape, max(lengths), device)
        turns = (cos.bfloat16(), sin.bfloat16())
        scale = LATENT.query_dim**-0.5
        kernels = operators(Heads(1, heads, LATENT.query_dim, EPS, scale, *turns, LATENT))
        pool = BlockPool(shape, 1, torch.bfloat16, device, token_major=kernels.token_major)
        rows = shuffled_blocks(lengths, pool)
        for row, of_keys, of_latents in zip(rows, keys, latents, strict=True):
            before = of_keys[:-1].to(device), of_latents[:-1].to(device)
            pool.write(row.own, before[0][None, None], before[1][None, None])
        step = DecodeStep(DecodeLayout(rows, pool, 1, heads, device), positions.numpy())
        new_latent = torch.stack([row[-1] for row in latents]).to(device)
        new_key = torch.stack([row[-1] for row in keys]).to(device)
        attend = kernels.decoding_latent(step)
        output = attend(0, query.flatten(1).to(device), new_latent, new_key, Linear(up.to(device)))
        return [output.view(count, heads, LATENT.value_dim)]

    def plain(dtype: torch.dtype) -> Results:
        cos, sin = tables(positions, LATENT.rope_dim, dtype)
        nope, rope = query.to(dtype).split([LATENT.nope_dim, LATENT.rope_dim], dim=-1)
        turned = reference.rotate_half(reference.halves(rope), cos, sin)
        whole = torch.cat([nope, turned], dim=-1)
        outputs = []
        for row, length in enumerate(lengths):
            made = (latents[row].to(dtype) @ up.to(dtype).T).view(length, heads, -1)
            of_nope, values = made.split([LATENT.nope_dim, LATENT.value_dim], dim=-1)
            of_rope = keys[row].to(dtype)
            new = reference.halves(of_rope[-1:])
            of_rope = torch.cat([of_rope[:-1], reference.rotate_half(new, cos[row], sin[row])])
            shared = of_rope[:, None].expand(-1, heads, -1)
            all_keys = torch.cat([of_nope, shared], dim=-1)
            outputs.append(reference.attend(whole[row : row + 1], all_keys, values, None))
        return [torch.cat(outputs)]

    return Case(name, ours, plain)


def shuffled_blocks(lengths: Sequence[int], pool: BlockPool) -> list[SampleBlocks]:
    """Blocks for rows of these lengths, out of order, with some between them that nobody uses."""
    counts = [-(-length // pool.block) for length in lengths]
    pool.reserve(sum(counts) + 3)
    order = torch.randperm(pool.num_blocks).tolist()
    rows = []
    for number, count in enumerate(counts):
        rows.append(SampleBlocks(number, [], order[:count]))
        order = order[count:]
    return rows


def norm(name: str, width: int, device: torch.device, add: bool) -> Case:
    """RMSNorm, of a sum or of its input alone; a sum is a result, too."""
    hidden = random(5, width)
    delta = random(5, width)
    weight = random(width)

    def ours() -> Results:
        kernels = decoder_operators(Model(64, 1), device, 16)
        more = delta.to(device) if add else None
        return list(kernels.add_norm(hidden.to(device), more, weight.to(device)))

    def plain(dtype: torch.dtype) -> Results:
        total = hidden.to(dtype)
        if add:
            total = total + delta.to(dtype)
        return [reference.rms_norm(total, weight.to(dtype), EPS), total]

    return Case(name, ours, plain)


def activation(name: str, width: int, device: torch.device) -> Case:
    """SwiGLU of gates and values that lie side by side."""
    gate_up = random(5, 2 * width)

    def ours() -> Results:
        return [decoder_operators(Model(64, 1), device, 16).silu_mul(gate_up.to(device))]

    def plain(dtype: torch.dtype) -> Results:
        return [reference.swiglu(gate_up.to(dtype))]

    return Case(name, ours, plain)


def mixture(name: str, held: tuple[int, int], tokens: int, device: torch.device) -> Case:
    """What experts [first, end) of eight add to tokens that go to three each."""
    first, end = held
    width = 256
    inner = 128
    x = random(tokens, width)
    gate_up = random(end - first, 2 * inner, width) / 16
    down = random(end - first, width, inner) / 8
    scores = torch.randn(tokens, 8)
    ids = scores.topk(3, dim=-1).indices
    weights = scores.gather(1, ids).softmax(dim=-1)

    def ours() -> Results:
        kernels = decoder_operators(Model(64, 1), device, 16)
        local = LocalExperts(gate_up.to(device), down.to(device), first, total=8)
        return [kernels.experts(x.to(device), ids.to(device), weights.to(device), local)]

    def plain(dtype: torch.dtype) -> Results:
        return [
            reference.experts(x.to(dtype), ids, weights, gate_up.to(dtype), down.to(dtype), first)
        ]

    return Case(name, ours, plain)
