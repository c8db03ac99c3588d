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
# Tokens of all rollout replicas that share experts, which an exchange gathers at once. Of 7,168 columns in
# bf16 they take 59 MB, and an exchange has so many copies of them: those gathered, those of them that are
# no filler, what the rank's experts found, and sums with filler.
EXCHANGED_TOKENS = 4096
EXCHANGE_COPIES = 4
# And of each expert that a token goes to, on NPUs: sorted, found, and those of this rank alone.
CHOICE_COPIES = 3
# Of the optimizer, for each parameter: two fp32 moments, and beside bf16 weights an fp32 copy.
MOMENT_BYTES = 8
MASTER_BYTES = 4
OPTIMIZER_BYTES = MOMENT_BYTES + MASTER_BYTES
# Parameters whose optimizer state visits the device at a time where it lies on the host: 400 MB.
OFFLOAD_VISIT_ELEMENTS = 2**25
