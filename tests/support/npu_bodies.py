"""What tests run on ranks of the stand-in for torch_npu. Imported by its server alone."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch_npu
from support.npu_items import npu_check_item  # noqa: F401
from support.patience import LONG

from r1zero.distributed.collectives import all_sum
from r1zero.distributed.device import open_device
from r1zero.distributed.groups import World
from r1zero.distributed.launch import Launch
from r1zero.preflight import checks
from r1zero.preflight.resolve import load_config
from r1zero.preflight.run import resolve
from r1zero.trainer import prepare, train


def train_as_on_npus(
    rank: int, size: int, store: dist.Store, config: str, overrides: list[str]
) -> list[str]:
    """Train as main.py does; returns the roles of this rank."""
    cfg, warnings = load_config(config, overrides)
    run = resolve(cfg, warnings, size, [0] * size)
    launch = Launch("single", rank, size, rank, (0,) * size, "", 0)
    world = World(launch, run.placement, open_device("npu", rank), timedelta(seconds=LONG), store)
    train(prepare(run, world))
    return world.role_names


def train_in_fp32(
    rank: int, size: int, store: dist.Store, config: str, overrides: list[str]
) -> list[str]:
    """The same in fp32, which the hardware refuses: limits of operators only warn."""
    from torch_npu import _bodies

    _bodies._only_warns = True
    checks.check_dtype = lambda *_: []
    return train_as_on_npus(rank, size, store, config, [*overrides, "training.bf16=false"])


def calls_with_gradients(
    rank: int, size: int, store: dist.Store, names: list[str], overrides: list[str]
) -> list[int]:
    """Train, and count the calls of these operators of torch_npu that keep what a gradient needs."""
    counted = dict.fromkeys(names, 0)

    def counting(name: str) -> Callable[..., Any]:
        operator = getattr(torch_npu, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += torch.is_grad_enabled()
            return operator(*args, **kwargs)

        return call

    for name in names:
        setattr(torch_npu, name, counting(name))
    train_as_on_npus(rank, size, store, "tiny", overrides)
    return list(counted.values())


def sum_in_float64(rank: int, size: int, store: dist.Store) -> float:
    """What the control plane sums over gloo, after MindSpeed's adaptor was imported."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    values = torch.tensor([rank + 1 / 3], dtype=torch.float64)
    return float(all_sum(values, dist.group.WORLD))


def refusal(rank: int, size: int, store: dist.Store, name: str) -> str:
    """The sentence with which a call of CALLS is refused; "" if it is not."""
    try:
        CALLS[name]()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return ""


# -- calls that work, and broken ones ---------------------------------------------------------------------------------


def _norm(**changes: Any) -> Any:
    arguments = {
        "self": torch.ones(2, 16, device="npu"),
        "gamma": torch.ones(16, device="npu"),
        "epsilon": 1e-6,
    }
    return torch_npu.npu_rms_norm(**{**arguments, **changes})


def _decode(**changes: Any) -> Any:
    cache = torch.zeros(4, 2, 16, 16, device="npu", dtype=torch.bfloat16)
    arguments = {
        "block_table": torch.zeros(3, 2, device="npu", dtype=torch.int32),
        "actual_seq_lengths_kv": [1, 16, 17],
        "num_heads": 4,
        "num_key_value_heads": 2,
        "scale": 0.25,
        "input_layout": "BNSD",
        "block_size": 16,
    }
    query = changes.pop("query", None)
    if query is None:
        query = torch.ones(3, 4, 1, 16, device="npu", dtype=torch.bfloat16)
    call = torch_npu.npu_fused_infer_attention_score
    return call(query, cache, cache, **{**arguments, **changes})[0]


def _decode_latents(**changes: Any) -> Any:
    latents = changes.pop("latents", _halves(4, 1, 16, 512))
    query = changes.pop("query", _halves(3, 4, 1, 512))
    arguments = {
        "query_rope": _halves(3, 4, 1, 64),
        "key_rope": _halves(4, 1, 16, 64),
        "block_table": torch.zeros(3, 2, device="npu", dtype=torch.int32),
        "actual_seq_kvlen": [1, 16, 17],
        "num_query_heads": 4,
        "num_key_value_heads": 1,
        "softmax_scale": 0.25,
        "input_layout": "BNSD_NBSD",
        "block_size": 16,
    }
    call = torch_npu.npu_fused_infer_attention_score_v2
    return call(query, latents, latents, **{**arguments, **changes})[0]


def _write_cache(**changes: Any) -> None:
    arguments = {
        "key": _halves(3, 1, 64),
        "value": _halves(3, 1, 512),
        "key_cache": _halves(4, 16, 1, 64),
        "value_cache": _halves(4, 16, 1, 512),
        "slot_mapping": torch.tensor([0, 17, 63]).to("npu"),
        "cache_mode": "Norm",
    }
    torch_npu.npu_scatter_pa_kv_cache(**{**arguments, **changes})


def _train_attention(**changes: Any) -> Any:
    x = torch.ones(4, 2, 16, device="npu")
    arguments = {
        "head_num": 2,
        "input_layout": "TND",
        "atten_mask": torch.ones(2048, 2048, device="npu", dtype=torch.bool).triu(1),
        "scale": 0.25,
        "actual_seq_qlen": [1, 4],
        "actual_seq_kvlen": [1, 4],
        "sparse_mode": 3,
    }
    return torch_npu.npu_fusion_attention(x, x, x, **{**arguments, **changes})[0]


def _captured(auto_dispatch_capture: bool) -> Any:
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph, auto_dispatch_capture=auto_dispatch_capture):
        _decode()
    return graph


def _replay_twice_with_one_update() -> None:
    graph = _captured(auto_dispatch_capture=True)
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [2, 17, 18]}])
    graph.replay()
    graph.replay()


def _read_back_while_capturing() -> None:
    with torch.npu.graph(torch.npu.NPUGraph()):
        float(_norm()[0].sum())


def _add_up(tensor: torch.Tensor, **options: Any) -> None:
    store = dist.HashStore()
    made = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    made.hccl_config = options
    dist.init_process_group("hccl", store=store, rank=0, world_size=1, pg_options=made)
    torch.distributed.distributed_c10d._get_default_group().allreduce([tensor]).wait()


def _replay_after_an_update() -> None:
    graph = _captured(auto_dispatch_capture=True)
    graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [2, 17, 18]}])
    graph.replay()


def _gradient_of_a_norm_of_a_sum() -> None:
    x = torch.ones(2, 16, device="npu", requires_grad=True)
    normed, _, _ = torch_npu.npu_add_rms_norm(x, x, torch.ones(16, device="npu"))
    normed.sum().backward()


def _device_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(*shape, device="npu", dtype=dtype)


def _halves(*shape: int) -> torch.Tensor:
    return _device_tensor(*shape, dtype=torch.bfloat16)


CALLS: dict[str, Callable[[], object]] = {
    "a norm": _norm,
    "a decode attention": _decode,
    "an attention to latents": _decode_latents,
    "a cache write": _write_cache,
    "a training attention": _train_attention,
    "a sum": lambda: _add_up(_device_tensor(2), hccl_buffer_size=8),
    "a replay": _replay_after_an_update,
    "wrong keyword": lambda: torch_npu.npu_rms_norm(_device_tensor(2, 16), gama=1),
    "unknown keyword": lambda: _norm(eps=1e-6),
    "wrong type": lambda: _train_attention(scale="a quarter"),
    "CPU tensor for a fused operator": lambda: _norm(gamma=torch.ones(16)),
    "CPU tensor for PyTorch's operator": lambda: _device_tensor(3) + torch.ones(3),
    "CPU tensor for a collective": lambda: _add_up(torch.ones(2)),
    "fp32 for the decode attention": lambda: _decode(query=_device_tensor(3, 4, 1, 16)),
    "int64 block table": lambda: _decode(block_table=_device_tensor(3, 2, dtype=torch.int64)),
    "fewer lengths than rows": lambda: _decode(actual_seq_lengths_kv=[1, 16]),
    "latents of another size": lambda: _decode_latents(
        query=_halves(3, 4, 1, 256), latents=_halves(4, 1, 16, 256)
    ),
    "latents of another size than queries": lambda: _decode_latents(latents=_halves(4, 1, 16, 256)),
    "a rotary part of another size": lambda: _decode_latents(query_rope=_halves(3, 4, 1, 32)),
    "keys of another size": lambda: _decode_latents(key_rope=_halves(4, 1, 16, 32)),
    "heads of latents that are no power of two": lambda: _decode_latents(
        query=_halves(3, 3, 1, 512), query_rope=_halves(3, 3, 1, 64), num_query_heads=3
    ),
    "two queries of a row": lambda: _decode_latents(
        query=_halves(3, 4, 2, 512), query_rope=_halves(3, 4, 2, 64)
    ),
    "two kv heads of latents": lambda: _decode_latents(num_key_value_heads=2),
    "blocks of 32 latents": lambda: _decode_latents(
        latents=_halves(4, 1, 32, 512), key_rope=_halves(4, 1, 32, 64), block_size=32
    ),
    "a causal mode for latents": lambda: _decode_latents(sparse_mode=3),
    "fp32 for latents": lambda: _decode_latents(query=_device_tensor(3, 4, 1, 512)),
    "queries of latents that lie head by head": lambda: _decode_latents(
        query=_halves(4, 3, 1, 512).transpose(0, 1)
    ),
    "no rotary parts": lambda: _decode_latents(query_rope=None, key_rope=None),
    "latents without a block table": lambda: _decode_latents(block_table=None),
    "a block table that is too narrow": lambda: _decode_latents(actual_seq_kvlen=[1, 16, 33]),
    "keys of other tokens than values": lambda: _write_cache(key=_halves(2, 1, 64)),
    "values of another size than their cache": lambda: _write_cache(value=_halves(3, 1, 256)),
    "two tokens for one slot": lambda: _write_cache(
        slot_mapping=torch.tensor([0, 17, 17]).to("npu")
    ),
    "ends before the last token": lambda: _train_attention(actual_seq_qlen=[1, 3]),
    "a mask that is not compressed": lambda: _train_attention(
        atten_mask=_device_tensor(4, 4, dtype=torch.bool).triu(1)
    ),
    "float64 for a sum over NPUs": lambda: _add_up(_device_tensor(2, dtype=torch.float64)),
    "an unknown option of a group": lambda: _add_up(_device_tensor(2), hccl_buffersize=8),
    "a replay without an update": lambda: _captured(auto_dispatch_capture=True).replay(),
    "a second replay after one update": _replay_twice_with_one_update,
    "an update that was not provided for": lambda: _captured(auto_dispatch_capture=False).update(
        cpu_update_input=[{"actual_seq_lengths_kv": [2, 17, 18]}]
    ),
    "waiting for the device while capturing": _read_back_while_capturing,
    "a gradient of what has none": _gradient_of_a_norm_of_a_sum,
}
