"""vLLM in this process, over the ranks of one replica: no Ray, no server, no children.

Every rank of a replica holds one worker and runs the same scheduler on the same requests, as the
native engine does; vLLM calls that an external launcher. Importing this imports vLLM, which reads its
environment then: see NEEDED of engine.py.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import vllm.model_executor.layers.utils as vllm_linears
from vllm import EngineArgs, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

from r1zero.distributed.collectives import barrier, broadcast_object
from r1zero.models.family import family_of
from r1zero.rollout.interface import EngineSetup

SHARED_MEMORY = Path("/dev/shm")
PACKS_LINEARS = "dispatch_cpu_unquantized_gemm"
BLOCK = 128  # tokens of a cache block, at most
MAX_RUNNING = 256  # vLLM wants a number; its own default
PREFILL_TOKENS = 4096  # of prompts in one pass, as in the native engine


def start(setup: EngineSetup) -> LLMEngine:
    """Build vLLM's engine, its weights not yet those to generate with. Called on all ranks of a
    replica together."""
    control = setup.grid.replica_control
    assert control is not None, "every replica has its control group"
    leader = setup.grid.span.output_rank(setup.grid.replica)
    word = broadcast_object(secrets.token_hex(8), leader, control)
    linears: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if setup.device.type == "cpu":
        linears = _plain_linears()
    with setup.grid.replica_as_default_group(), linears:
        engine = LLMEngine.from_engine_args(_arguments(setup, word))
    barrier(control)  # all have opened what lies under that name
    if setup.grid.tp_index == 0:
        _forget_shared_memory(word)
    return engine


def runner_of(engine: LLMEngine) -> Any:
    """What runs the model on this rank: it holds the batch, the sampler and the model."""
    return engine.model_executor.driver_worker.model_runner


def add_request(
    engine: LLMEngine, name: str, prompt: list[int], budget: int, end_ids: tuple[int, ...]
) -> None:
    """Ask for one sample of at most `budget` tokens; it comes when it is complete."""
    settings = SamplingParams(
        max_tokens=budget,
        stop_token_ids=list(end_ids),
        ignore_eos=True,  # the ends above are all there are
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), settings)


def _arguments(setup: EngineSetup, word: str) -> EngineArgs:
    config = setup.config
    max_running = config.max_running or MAX_RUNNING
    prefill = min(PREFILL_TOKENS, max_running * config.max_length)
    graphs = config.graphs
    if graphs is None:
        graphs = setup.device.type == "npu"
    more: dict[str, Any] = {}
    if setup.device.type == "npu":
        # Else weights might lie in a format that must not be written in place; what older releases
        # of vllm-ascend read is a variable, see NEEDED of engine.py.
        more["additional_config"] = {"weight_nz_mode": 0}
    return EngineArgs(
        model=str(setup.model_folder),
        load_format="dummy",  # publishing brings the weights
        skip_tokenizer_init=True,
        dtype=str(setup.dtype).removeprefix("torch."),
        max_model_len=config.max_length,
        max_num_seqs=max_running,
        max_num_batched_tokens=max(prefill, max_running),
        kv_cache_memory_bytes=_cache_bytes(setup),
        tensor_parallel_size=setup.grid.span.tp,
        distributed_executor_backend=_executor_of(setup, word),
        enforce_eager=not graphs,
        # the scheduler knows every token drawn, and the ranks of a replica stay in step
        async_scheduling=False,
        disable_log_stats=True,
        **more,
    )


def _cache_bytes(setup: EngineSetup) -> int:
    """Memory for so many tokens as the user allows, and for one sample at least. Two blocks more:
    one that vLLM keeps to itself, one that a sample leaves unfilled."""
    elements = family_of(setup.shape).kv_cache_elements(setup.shape, setup.grid.span.tp)
    tokens = max(setup.config.max_cache_tokens, setup.config.max_length)
    blocks = -(-tokens // BLOCK) + 2
    return int(elements * setup.dtype.itemsize) * BLOCK * blocks


def _executor_of(setup: EngineSetup, word: str) -> type[ExecutorWithExternalLauncher]:
    """The executor of this rank, which asks no environment variable who it is."""
    index = setup.grid.tp_index
    device_index = index if setup.device.index is None else setup.device.index

    class ReplicaExecutor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            # On CPUs shared memory is named after what follows the last colon. A name that somebody
            # had, another replica of this machine or a run that is over, would not do.
            return f"replica:{word}", index, device_index

    return ReplicaExecutor


@contextlib.contextmanager
def _plain_linears() -> Iterator[None]:
    """Let vLLM leave linear weights as they are. On CPUs it would lay out a copy at load, which what
    is published would not reach."""

    def plain(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear  # type: ignore[assignment]

    packs = getattr(vllm_linears, PACKS_LINEARS)  # a vLLM that calls it otherwise must not start
    setattr(vllm_linears, PACKS_LINEARS, plain)
    try:
        yield
    finally:
        setattr(vllm_linears, PACKS_LINEARS, packs)


def _forget_shared_memory(word: str) -> None:
    """Take the names of what was opened away, so that nothing is left behind however the run ends."""
    for path in SHARED_MEMORY.glob(f"*{word}*"):
        path.unlink(missing_ok=True)
