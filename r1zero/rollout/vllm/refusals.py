"""What vLLM cannot do as an engine here, by model, TP and device. Needs neither vLLM nor torch."""

from __future__ import annotations

from r1zero.models.config import ModelConfig

KEY = "actor_rollout.engine: vllm"
WAY_OUT = "set engine to native"
# Those whose samples in vLLM were compared with ours.
FAMILIES = ("llama", "qwen2", "qwen3")
# Columns of a head that vLLM's attention takes on a CPU.
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
PADDING = 64  # vLLM pads the rows of the vocabulary to a multiple of this before it cuts them


def refusal(shape: ModelConfig, tp: int, device: str) -> str | None:
    """Say why vLLM must not generate with this model, TP over `device`s ("cpu", "npu"); None if it
    may."""
    if shape.experts is not None:
        return (
            f"{KEY} does not take models with experts, such as this {shape.family}: it does not tell "
            f"which experts a token went to; {WAY_OUT}"
        )
    if shape.family not in FAMILIES:
        return f"{KEY} takes models of {', '.join(FAMILIES)}, and this is {shape.family}; {WAY_OUT}"
    if device == "cpu" and shape.head_dim not in CPU_HEADS:
        heads = ", ".join(map(str, CPU_HEADS))
        return f"{KEY} takes heads of {heads} columns on a CPU, and this model's have {shape.head_dim}; {WAY_OUT}"
    if tp > 1 and shape.vocab_size % PADDING:
        return (
            f"actor_rollout.infer_tensor_parallel_size: {tp} does not go with {KEY} and a vocabulary of "
            f"{shape.vocab_size} rows, which vLLM pads to a multiple of {PADDING} before it cuts them; "
            f"set it to 1, or {WAY_OUT}"
        )
    return None
