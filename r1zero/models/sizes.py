"""Constants of memory: sizes that one part works with and another estimates by; needs no torch."""

from __future__ import annotations

# Elements of fp32 logits that the trainer and the reference hold at once: 256 MB.
LOGIT_CHUNK_ELEMENTS = 64 * 2**20
# Buckets of published weights that are under way at a time.
BUCKETS_IN_FLIGHT = 4
# Tokens in a block of the KV cache: long enough for efficient products, short enough not to waste
# much on a last block; 128 is what Ascend's fused attention asks for.
CPU_CACHE_BLOCK = 64
NPU_CACHE_BLOCK = 128
# Of the optimizer, for each parameter: two fp32 moments, and beside bf16 weights an fp32 copy.
MOMENT_BYTES = 8
MASTER_BYTES = 4
OPTIMIZER_BYTES = MOMENT_BYTES + MASTER_BYTES
# Parameters whose optimizer state visits the device at a time where it lies on the host: 400 MB.
OFFLOAD_VISIT_ELEMENTS = 2**25
