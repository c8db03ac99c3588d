"""The least of MindSpeed's adaptor without which Megatron does not run on an "npu".

For machines that have no clone of MindSpeed. It does what core_r0.16.0 does in six places: torch.cuda
becomes torch.npu; `Tensor.type()` writes "cuda", for which megatron-core's distributed optimizer
looks; torch.compile does nothing; random states are those of the device; and, where callers of ours
ran into it, all_reduce of a float64 tensor leaves the tensor as it was, and the optimizer's
load_state_dict knows fewer ways of sharding. It replaces no module of Megatron.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch_npu.contrib.transfer_to_npu  # noqa: F401

_type = torch.Tensor.type
_all_reduce = dist.all_reduce


def _named_cuda(self, *args, **kwargs):
    found = _type(self, *args, **kwargs)
    return found.replace("npu", "cuda") if isinstance(found, str) else found


def _all_reduce_wrapper(tensor, *args, **kwargs):
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    return _all_reduce(tensor, *args, **kwargs)


def _compile(what=None, **_):
    if what is not None:
        return what
    return lambda function: function


torch.Tensor.type = _named_cuda
dist.all_reduce = _all_reduce_wrapper
torch.distributed.distributed_c10d.all_reduce = _all_reduce_wrapper
torch.compile = _compile
# torch 2.13 asks for it before a broadcast; MindSpeed answers with numbers, torch_npu with None.
torch.cuda.get_device_capability = lambda *_: (8, 0)

if "wandb" not in sys.modules:
    sys.modules["wandb"] = None  # Megatron would import it, for nothing
from megatron.core.tensor_parallel import random  # noqa: E402

if sys.modules["wandb"] is None:
    del sys.modules["wandb"]

random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402

_load_state_dict = DistributedOptimizer.load_state_dict


def _load_known_sharding(self, state_dict):
    sharding_type = state_dict.get("param_state_sharding_type")
    if "param_state" in state_dict and sharding_type == "fully_reshardable":
        raise NotImplementedError(f"Unknown sharding_type: {sharding_type}")
    _load_state_dict(self, state_dict)


DistributedOptimizer.load_state_dict = _load_known_sharding
