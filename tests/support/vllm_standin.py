"""A stand-in for vLLM: the few classes that r1zero/rollout/vllm calls, with what bites in the real one.

A dense model in vLLM's fused parameters, cut by TP; a prefix cache that keeps what old weights
computed; linear weights that are laid out elsewhere at load; prompts cut into pieces, rows that lose
what they computed, and a token drawn for them all the same; shared memory by name. It computes a
whole forward pass for each token. `install` makes it what `import vllm` finds, for the rest of a
process.
"""

from __future__ import annotations

import json
import math
import secrets
import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional

PIECE = 7  # tokens of a prompt in one pass
LOSES = 11  # in every so many passes a row starts over
PADDING = 64
SHARED_MEMORY = Path("/dev/shm")


# -- what is asked ---------------------------------------------------------------------------------


@dataclass(kw_only=True)
class EngineArgs:
    model: str
    load_format: str
    skip_tokenizer_init: bool
    dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_memory_bytes: int
    tensor_parallel_size: int
    distributed_executor_backend: type
    enforce_eager: bool
    async_scheduling: bool
    disable_log_stats: bool


class RequestOutputKind(Enum):
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    max_tokens: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool
    output_kind: RequestOutputKind
    temperature: float = 1.0


@dataclass
class Request:
    name: str  # as it was given
    prompt: list[int]
    settings: SamplingParams
    inner_name: str = ""
    drawn: list[int] = field(default_factory=list)
    computed: int = 0  # tokens that are in the cache

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.drawn


# -- the model -------------------------------------------------------------------------------------


def dispatch_cpu_unquantized_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Lay a linear's weight out for the processor, which is a copy."""
    packed = layer.weight.detach().clone()
    layer.cpu_linear = lambda x, weight, bias=None: functional.linear(x, packed, bias)
    if remove_weight:
        layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


class Linear(torch.nn.Module):
    def __init__(self, rows: int, columns: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(rows, columns), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.randn(rows), requires_grad=False) if bias else None

    def lay_out(self, remove_weight: bool) -> None:
        # by its module, as vLLM calls it
        sys.modules["vllm.model_executor.layers.utils"].dispatch_cpu_unquantized_gemm(
            self, remove_weight
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.cpu_linear(x, self.weight, self.bias)


class Norm(torch.nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(torch.nn.Module):
    def __init__(self, config: dict[str, Any], tp: int) -> None:
        super().__init__()
        self.head = config["hidden_size"] // config["num_attention_heads"]
        self.queries = config["num_attention_heads"] // tp
        self.keys = config["num_key_value_heads"] // tp
        rows = (self.queries + 2 * self.keys) * self.head
        self.qkv_proj = Linear(rows, config["hidden_size"], bias=True)
        self.o_proj = Linear(config["hidden_size"], self.queries * self.head)
        exponents = torch.arange(0, self.head, 2) / self.head
        self.speeds = config["rope_parameters"]["rope_theta"] ** -exponents

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] to this rank's part of a sum [T, H]."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head)).transpose(0, 1)
        query, key, value = heads.split([self.queries, self.keys, self.keys])
        share = self.queries // self.keys
        key, value = (part.repeat_interleave(share, dim=0) for part in (key, value))
        found = functional.scaled_dot_product_attention(
            self._turn(query), self._turn(key), value, is_causal=True
        )
        return self.o_proj(found.transpose(0, 1).flatten(1))

    def _turn(self, x: torch.Tensor) -> torch.Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.speeds
        angles = torch.cat([angles, angles], dim=-1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


class Mlp(torch.nn.Module):
    def __init__(self, config: dict[str, Any], tp: int) -> None:
        super().__init__()
        size = config["intermediate_size"] // tp
        self.gate_up_proj = Linear(2 * size, config["hidden_size"])
        self.down_proj = Linear(config["hidden_size"], size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(functional.silu(gate) * up)


class Layer(torch.nn.Module):
    def __init__(self, config: dict[str, Any], tp: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, tp)
        self.mlp = Mlp(config, tp)
        self.input_layernorm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = Norm(config["hidden_size"], config["rms_norm_eps"])


class Model(torch.nn.Module):
    """A rank's part of Qwen2 with a tied head, by vLLM's names."""

    def __init__(self, config: dict[str, Any], tp: int, index: int, group: Any) -> None:
        super().__init__()
        assert config["tie_word_embeddings"]
        self.tp, self.group = tp, group
        self.vocabulary = config["vocab_size"]
        rows = math.ceil(self.vocabulary / PADDING) * PADDING // tp
        self.first = index * rows
        self.model = torch.nn.Module()
        self.model.embed_tokens = Linear(rows, config["hidden_size"])
        self.model.layers = torch.nn.ModuleList(
            Layer(config, tp) for _ in range(config["num_hidden_layers"])
        )
        self.model.norm = Norm(config["hidden_size"], config["rms_norm_eps"])
        for module in self.modules():
            if isinstance(module, Linear):
                module.lay_out(remove_weight=module is not self.model.embed_tokens)

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """Logits behind the last token, fp32 [V], on all ranks."""
        table = self.model.embed_tokens.weight
        ids = torch.tensor(tokens) - self.first
        here = (ids >= 0) & (ids < len(table))
        x = self._sum(table[ids.where(here, 0)] * here[:, None])
        for layer in self.model.layers:
            x = x + self._sum(layer.self_attn(layer.input_layernorm(x)))
            x = x + self._sum(layer.mlp(layer.post_attention_layernorm(x)))
        part = self.model.embed_tokens(self.model.norm(x[-1:]))[0]
        parts = [part]
        if self.tp > 1:
            parts = [torch.empty_like(part) for _ in range(self.tp)]
            dist.all_gather(parts, part, group=self.group)
        return torch.cat(parts)[: self.vocabulary]

    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp > 1:
            dist.all_reduce(x, group=self.group)
        return x


# -- executor, sampler, engine ---------------------------------------------------------------------


class ExecutorWithExternalLauncher:
    """One worker over all ranks of torch's default group."""

    def __init__(self, args: EngineArgs) -> None:
        name, index, _ = self._distributed_args()
        tp = args.tensor_parallel_size
        assert dist.get_world_size() == tp, "vLLM takes the whole default group for its own"
        assert dist.get_rank() == index
        for _ in range(3):  # more of them than it needs, as vLLM
            group = dist.new_group(list(range(tp)))
        if tp > 1:
            _open_shared_memory(f"{name.split(':')[-1]}-tp:0-cpushm_{index}")
        config = json.loads((Path(args.model) / "config.json").read_text())
        runner = SimpleNamespace(sampler=None, input_batch=None)
        model = Model(config, tp, index, group)
        runner.get_model = lambda: model
        self.driver_worker = SimpleNamespace(model_runner=runner)

    def _distributed_args(self) -> tuple[str, int, int]:
        raise AssertionError("stock vLLM reads RANK, which is that of the whole world")


def _open_shared_memory(name: str) -> None:
    try:
        (SHARED_MEMORY / name).open("x").close()
    except FileExistsError:
        raise RuntimeError("create shm in SHMManager failed. errno: 17") from None


class Sampler(torch.nn.Module):
    def forward(self, logits: torch.Tensor, metadata: object) -> torch.Tensor:
        tokens, logprobs = self.sample(logits, metadata)
        assert logprobs is None
        return tokens


class LLMEngine:
    """Runs up to max_num_seqs requests, the first ones first."""

    def __init__(self, args: EngineArgs) -> None:
        self.args = args
        self.model_executor = args.distributed_executor_backend(args)
        self.runner = self.model_executor.driver_worker.model_runner
        self.requests: list[Request] = []
        self.prefixes: dict[tuple[int, ...], torch.Tensor] = {}  # logits behind whole prompts
        self.passes = 0

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> LLMEngine:
        return cls(args)

    def add_request(self, name: str, prompt: dict, settings: SamplingParams) -> None:
        tokens = prompt["prompt_token_ids"]
        assert settings.temperature == 1.0 and settings.ignore_eos
        assert len(tokens) + settings.max_tokens <= self.args.max_model_len
        # other characters on every rank
        inner = f"{name}-{secrets.token_hex(4)}"
        self.requests.append(Request(name, tokens, settings, inner))

    def reset_prefix_cache(self) -> bool:
        if self.requests:
            return False
        self.prefixes.clear()
        return True

    def step(self) -> list[SimpleNamespace]:
        self.passes += 1
        running = self.requests[: self.args.max_num_seqs]
        if self.passes % LOSES == 0:
            running[-1].computed = 0
        tokens = self._draw(running)
        finished = []
        for request, token in zip(running, tokens.tolist(), strict=True):
            if request.computed == len(request.tokens):
                request.drawn.append(token)
                if reason := _reason(request):
                    finished.append(_output(request, reason))
                    self.requests.remove(request)
        return finished

    def _draw(self, running: list[Request]) -> torch.Tensor:
        """A token for every row, also for those that are not through their tokens."""
        logits = [self._logits(request) for request in running]
        self.runner.input_batch = SimpleNamespace(
            req_ids=[request.inner_name for request in running],
            num_tokens_no_spec=np.array([len(request.tokens) for request in running]),
            num_prompt_tokens=np.array([len(request.prompt) for request in running]),
        )
        return self.runner.sampler(torch.stack(logits), object())

    def _logits(self, request: Request) -> torch.Tensor:
        prefix = tuple(request.prompt)
        if not request.drawn and prefix in self.prefixes:
            request.computed = len(request.prompt)
            return self.prefixes[prefix].clone()
        request.computed = min(request.computed + PIECE, len(request.tokens))
        logits = self.runner.get_model()(request.tokens[: request.computed])
        if request.computed == len(request.tokens) == len(prefix):
            self.prefixes[prefix] = logits.clone()
        return logits


def _reason(request: Request) -> str:
    """Why a request is through; "" if it is not. The length first, as older vLLM does."""
    if len(request.drawn) == request.settings.max_tokens:
        return "length"
    return "stop" if request.drawn[-1] in request.settings.stop_token_ids else ""


def _output(request: Request, reason: str) -> SimpleNamespace:
    completion = SimpleNamespace(token_ids=list(request.drawn), finish_reason=reason)
    return SimpleNamespace(request_id=request.name, finished=True, outputs=[completion])


# -- in the place of vLLM --------------------------------------------------------------------------

MODULES: dict[str, dict[str, Any]] = {
    "vllm": {"EngineArgs": EngineArgs, "SamplingParams": SamplingParams},
    "vllm.inputs": {"TokensPrompt": dict},
    "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.utils": {
        "dispatch_cpu_unquantized_gemm": dispatch_cpu_unquantized_gemm
    },
    "vllm.v1": {},
    "vllm.v1.engine": {},
    "vllm.v1.engine.llm_engine": {"LLMEngine": LLMEngine},
    "vllm.v1.executor": {},
    "vllm.v1.executor.uniproc_executor": {
        "ExecutorWithExternalLauncher": ExecutorWithExternalLauncher
    },
    "vllm.v1.sample": {},
    "vllm.v1.sample.sampler": {"Sampler": Sampler},
}


def install() -> None:
    """Let `import vllm` find this, for the rest of the process."""
    for name, contents in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(contents)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
