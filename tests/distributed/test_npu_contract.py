"""The NPU seam against torch_npu's published contract. No NPU is here: this mocks one, and says so.

The operator is defined in PyTorch's dispatcher with the signature of torch_npu's wheels
(2.7.1.post4 and 2.13.0), so PyTorch itself refuses a wrong keyword or type; its body computes on
the CPU what the documentation says. That proves the call and its meaning, not the kernel.
"""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.items import random_items
from support.multiproc import DEVICE
from support.shapes import small_shape
from torch.utils._python_dispatch import TorchDispatchMode

from r1zero.algo.packing import pack
from r1zero.distributed.device import Device
from r1zero.distributed.megatron_on_npu import import_mindspeed
from r1zero.ops import npu
from r1zero.ops.attention import packed_causal_attention
from r1zero.rollout import npu_graphs
from r1zero.rollout.block_attention import DecodeLayout, DecodeStep
from r1zero.rollout.decoder import Decoder
from r1zero.rollout.engine import EngineLimits, NativeEngine
from r1zero.rollout.interface import Sampling
from r1zero.rollout.kv_cache import BlockPool, SampleBlocks
from r1zero.rollout.native import operators
from r1zero.rollout.npu_operators import NpuOperators
from r1zero.types import Batch, Prompt

SIGNATURE = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float "
    "keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, "
    "int[]? prefix=None, int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int "
    'sparse_mode=0, bool gen_mask_parallel=True, bool sync=False, str softmax_layout="", '
    "Tensor? sink=None) -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"
)

INFER_SIGNATURE = (
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? "
    "pse_shift=None, Tensor? atten_mask=None, SymInt[]? actual_seq_lengths=None, SymInt[]? "
    "actual_seq_lengths_kv=None, Tensor? block_table=None, int num_heads=1, float scale=1.0, int "
    'pre_tokens=2147483647, int next_tokens=2147483647, str input_layout="BSH", int '
    "num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, "
    # without the quantisation arguments, which are not used
    "bool softmax_lse_flag=False) -> (Tensor, Tensor)"
)


def documented_infer(
    query,
    key,
    value,
    *,
    actual_seq_lengths_kv,
    block_table,
    num_heads,
    scale,
    input_layout,
    num_key_value_heads,
    block_size,
    sparse_mode=0,
    **others,
):
    """BNSD decode over blocks (blocks, kv heads, block, D): row i sees the first lengths[i] tokens
    of its blocks."""
    assert (
        input_layout == "BNSD"
        and query.shape[2] == 1
        and query.is_contiguous()
        and sparse_mode == 0
    )
    assert (
        block_table.dtype == torch.int32
        and key.shape[2] == block_size
        and key.shape[1] == num_key_value_heads
    )
    output = torch.empty_like(query)
    for row, length in enumerate(actual_seq_lengths_kv):
        keys, values = (
            x[block_table[row].long()].transpose(0, 1).flatten(1, 2)[:, :length]
            for x in (key, value)
        )
        for head in range(num_heads):
            shared = head // (num_heads // num_key_value_heads)
            weights = (query[row, head] @ keys[shared].t() * scale).softmax(-1)
            output[row, head] = weights @ values[shared]
    return output, query.new_empty(0)


def documented(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse,
    padding_mask,
    atten_mask,
    scale,
    keep_prob,
    pre_tockens,
    next_tockens,
    inner_precise,
    prefix,
    actual_seq_qlen,
    actual_seq_kvlen,
    sparse_mode,
    *others,
):
    """TND, sparse_mode 3: sequence i ends at entry i of the lists, masked where the 2048 x 2048
    mask, moved so that last query meets last key, is True; query head h reads key head h // (heads
    / kv heads)."""
    assert input_layout == "TND" and sparse_mode == 3 and head_num == query.shape[1]
    assert tuple(atten_mask.shape) == (2048, 2048) and atten_mask.dtype in (torch.bool, torch.uint8)
    assert (
        actual_seq_qlen[-1] == len(query)
        and actual_seq_kvlen[-1] == len(key)
        and actual_seq_qlen[0] > 0
    )
    output, q, k = torch.empty_like(query), 0, 0
    for q_end, k_end in zip(actual_seq_qlen, actual_seq_kvlen, strict=True):
        rows, columns = q_end - q, k_end - k
        for head in range(query.shape[1]):
            shared = head // (query.shape[1] // key.shape[1])
            scores = query[q:q_end, head] @ key[k:k_end, shared].t() * scale
            hidden = torch.arange(columns)[None] - torch.arange(rows)[:, None] > columns - rows
            output[q:q_end, head] = (
                scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value[k:k_end, shared]
            )
        q, k = q_end, k_end
    nothing = query.new_empty(0)
    return output, nothing, nothing, nothing, 0, 0, 0


@pytest.fixture(scope="module")
def library():
    made = torch.library.Library("npu_contract", "DEF")
    made.define(SIGNATURE)
    made.impl("npu_fusion_attention", documented, "CompositeExplicitAutograd")
    made.define(INFER_SIGNATURE)
    made.impl("npu_fused_infer_attention_score", documented_infer, "CompositeExplicitAutograd")
    yield torch.ops.npu_contract
    made._destroy()


def test_the_attention_call_keeps_the_published_contract(library, monkeypatch):
    monkeypatch.setitem(
        sys.modules,
        "torch_npu",
        types.SimpleNamespace(npu_fusion_attention=library.npu_fusion_attention),
    )
    batch = pack(random_items(), torch.device("cpu"))
    torch.manual_seed(1)
    query, key, value = (torch.randn(len(batch.tokens), heads, 8) for heads in (4, 2, 2))
    expected = packed_causal_attention(query, key, value, batch.segments, 0.25)
    rows = batch.segments.key_rows
    segments = batch.segments
    found = npu.varlen_attention(
        query, key[rows], value[rows], segments.cu_seqlens_q, segments.cu_seqlens_k, 0.25
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_decode_attention_call_keeps_the_published_contract(library, monkeypatch):
    """The NPU's call on block tables against our attention by blocks: two groups that share prompt
    blocks, ragged."""
    monkeypatch.setitem(
        sys.modules,
        "torch_npu",
        types.SimpleNamespace(
            npu_fused_infer_attention_score=library.npu_fused_infer_attention_score
        ),
    )
    shape = small_shape(num_layers=1)
    pool = BlockPool(shape, 2, torch.float32, torch.device("cpu"), block=4)
    pool.reserve(24)
    torch.manual_seed(3)
    pool.keys.normal_()
    pool.values.normal_()
    prompts = [pool.take_shared(2), pool.take_shared(1), []]
    rows = [
        SampleBlocks(p, prompts[p], pool.take_own(count))
        for p, count in ((0, 2), (0, 1), (1, 3), (2, 1), (0, 1))
    ]
    positions = np.array([13, 8, 15, 2, 11])
    step = DecodeStep(DecodeLayout(rows, pool, 3, 4, torch.device("cpu")), positions)
    query = torch.randn(5, 4, 16)
    expected = step.layout.products.attend(query, pool.keys[0], pool.values[0], step.mask_bias)
    found = npu.paged_attention(
        query, pool.keys[0], pool.values[0], step.layout.table, step.lengths
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class FakeGraph(TorchDispatchMode):
    """What NPUGraph promises, on a CPU: remembers operators with their tensors and runs them again
    on the same memory."""

    def __init__(self):
        super().__init__()
        self.launched, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.launched.append([function, args, dict(kwargs or {}), result])
        return result

    def update(self, cpu_update_input):
        [lists] = cpu_update_input
        updated = [entry for entry in self.launched if "fused_infer" in entry[0].name()]
        assert updated
        for _, _, kwargs, _ in updated:
            assert lists.keys() <= kwargs.keys()
            kwargs.update(lists)

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.launched:
            again = function(*args, **kwargs)
            for old, new in zip(
                *([x] if isinstance(x, torch.Tensor) else x for x in (result, again)), strict=True
            ):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_decoding_on_npus_takes_the_fused_kernels():
    on_npu = types.SimpleNamespace(device=types.SimpleNamespace(type="npu"))
    assert type(operators(types.SimpleNamespace(cos=on_npu))) is NpuOperators


def test_captured_decoding_steps_draw_the_same_samples(library, monkeypatch):
    """Two batches, so that graphs outlive a batch; the second is larger, so that the cache moves;
    rows come and go."""
    npu_graphs = []

    def make():
        npu_graphs.append(FakeGraph())
        return npu_graphs[-1]

    monkeypatch.setitem(
        sys.modules,
        "torch_npu",
        types.SimpleNamespace(
            npu_fused_infer_attention_score=library.npu_fused_infer_attention_score,
            npu=types.SimpleNamespace(
                NPUGraph=make, graph=lambda graph, auto_dispatch_capture: graph
            ),
        ),
    )
    shape = small_shape()
    drawn = {}
    for captured in (False, True):
        decoder = Decoder(shape, 1, None, torch.float32, torch.device("cpu"), 96, graphs=captured)
        decoder.operators = NpuOperators(decoder.operators.heads)
        torch.manual_seed(5)
        for weight in decoder.weights.values():
            weight.normal_(0, 0.2)
        limits = EngineLimits(48, 10**6, max_running=5, block=16)
        engine = NativeEngine(decoder, (3,), limits)
        engine.weights().commit(0)
        for step, count in ((1, 3), (2, 6), (3, 6)):
            prompts = [
                Prompt(i, "", np.arange(4, 9 + 5 * i, dtype=np.int32), "") for i in range(count)
            ]
            batch = Batch(step, 0, prompts, 3, 3 * count)
            engine.submit(batch, range(count), Sampling(1.0, 1.0, 0, 7))
            drawn[captured, step] = [
                s.tokens.tolist() for g in engine.collect(0) for s in g.samples
            ]
    assert sum(graph.replays for graph in npu_graphs) > 20
    for step in (1, 2, 3):
        assert drawn[True, step] == drawn[False, step]


def test_a_cache_that_grows_where_it_lay_is_captured_anew(monkeypatch):
    """An allocator may give the same address again; the layers behind the first one lie elsewhere
    all the same."""
    captured = []
    monkeypatch.setattr(npu_graphs, "capture_graph", lambda run: (captured.append(run), run()))
    monkeypatch.setattr(npu_graphs, "replay_graph", lambda graph, lengths: None)
    shape = small_shape()
    arena = torch.zeros(2 * 20 * 2 * 4 * 16)
    decode = npu_graphs.DecodeGraphs(lambda tokens, step: tokens.float()[:, None], 32)
    for blocks in (10, 20):
        pool = BlockPool(shape, 2, torch.float32, torch.device("cpu"), block=4)
        pool.num_blocks, pool.keys = (
            blocks,
            arena[: 2 * blocks * 2 * 4 * 16].view(2, blocks, 2, 4, 16),
        )
        step = DecodeStep(
            DecodeLayout([SampleBlocks(0, [], [1])], pool, 1, 4, torch.device("cpu")), np.array([2])
        )
        for _ in range(npu_graphs.WORTH_CAPTURING + 1):
            decode(torch.tensor([5]), step)
    assert len(captured) == 2


def test_mindspeed_does_not_see_our_command_line(monkeypatch):
    seen = []

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "mindspeed.megatron_adaptor":
                seen.append(list(sys.argv))
            return

    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace())
    package = types.ModuleType("mindspeed")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "mindspeed", package)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    argv = ["main.py", "--config", "qwen25_7b", "training.train_iters=3"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(ModuleNotFoundError):
        import_mindspeed()
    assert seen == [["main.py", "--use-flash-attn"]] and sys.argv == argv


def test_hccl_groups_have_bounded_buffers(monkeypatch):
    options = types.SimpleNamespace
    group = types.SimpleNamespace(ProcessGroupHCCL=types.SimpleNamespace(Options=options))
    monkeypatch.setitem(
        sys.modules,
        "torch_npu",
        types.SimpleNamespace(_C=types.SimpleNamespace(_distributed_c10d=group)),
    )
    on_npu = Device("npu", torch.device("cpu"), "hccl")
    assert on_npu.group_options(200).hccl_config == {"hccl_buffer_size": 200}
    assert DEVICE.group_options(200) is None


def test_the_cpu_answers_for_cuda_without_harm():
    assert (
        torch.zeros(1, device="cuda").device.type == "cpu"
        and torch.tensor([1], device="cuda").device.type == "cpu"
    )
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta" and torch.tensor([1.0]).device.type == "meta"
    assert (
        torch.ones(2).type() == "torch.cuda.FloatTensor"
        and torch.ones(2).type(torch.int64).dtype == torch.int64
    )
    assert np.asarray(torch.ones(2)).sum() == 2 and not dist.is_initialized()


def test_steps_are_traced_with_the_npu_profiler(tmp_path, monkeypatch):
    seen = []

    class Profile:
        def __init__(self, *, activities, on_trace_ready):  # no other argument is needed
            seen.append(activities)
            self._ready = on_trace_ready

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._ready(self)

    def tensorboard_trace_handler(
        dir_name=None, worker_name=None, analyse_flag=True, async_mode=False
    ):
        return lambda _: seen.append((dir_name, worker_name))

    activity = types.SimpleNamespace(CPU="cpu", NPU="npu")
    profiler = types.SimpleNamespace(
        profile=Profile,
        ProfilerActivity=activity,
        tensorboard_trace_handler=tensorboard_trace_handler,
    )
    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(profiler=profiler))
    with Device("npu", torch.device("cpu"), "hccl").trace(tmp_path, "train_rank_0000"):
        seen.append("step")
    assert seen == [["cpu", "npu"], "step", (str(tmp_path), "train_rank_0000")]
