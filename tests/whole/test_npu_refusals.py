"""What the stand-in for torch_npu refuses, so that a broken call cannot pass the jobs that run on it."""

from __future__ import annotations

import pytest

# A call of npu_bodies.BROKEN, and a part of the sentence that it is refused with.
REFUSED = {
    "wrong keyword": "missing value for argument 'gamma'",
    "unknown keyword": "expected at most 3 argument(s) but received 4",
    "wrong type": "Expected a value of type 'float' for argument 'scale'",
    "CPU tensor for a fused operator": "Expected all tensors to be on the same device",
    "CPU tensor for PyTorch's operator": "Expected all tensors to be on the same device",
    "CPU tensor for a collective": "No backend type associated with device type cpu",
    "fp32 for the decode attention": "takes fp16 or bf16, not torch.float32",
    "int64 block table": "block_table is torch.int64",
    "fewer lengths than rows": "2 lengths, 3 rows",
    "latents of another size": "latents of 256 columns, and only 512 are taken",
    "latents of another size than queries": "latents torch.Size([4, 1, 16, 256]) for queries",
    "a rotary part of another size": "query_rope torch.Size([3, 4, 1, 32])",
    "keys of another size": "key_rope torch.Size([4, 1, 16, 32])",
    "heads of latents that are no power of two": "3 heads, and only (1, 2, 4",
    "two queries of a row": "2 queries a row",
    "two kv heads of latents": "2 kv heads of latent attention",
    "blocks of 32 latents": "block size 32: 16 or 128",
    "a causal mode for latents": "sparse_mode 3 with one query a row",
    "fp32 for latents": "takes fp16 or bf16, not torch.float32",
    "queries of latents that lie head by head": "not contiguous",
    "no rotary parts": "only latent attention is played here",
    "latents without a block table": "latent attention needs a block_table",
    "a block table that is too narrow": "the block table is too narrow",
    "keys of other tokens than values": "keys torch.Size([2, 1, 64]), values torch.Size([3, 1, 512])",
    "values of another size than their cache": "a cache of other heads",
    "two tokens for one slot": "two tokens go to one slot",
    "ends before the last token": "queries end at 3 of 4",
    "a mask that is not compressed": "a compressed mask of torch.Size([4, 4])",
    "float64 for a sum over NPUs": "HCCL does not take torch.float64",
    "an unknown option of a group": "HCCL knows no option ['hccl_buffersize']",
    "a replay without an update": "would wait for an update for ever",
    "a second replay after one update": "would wait for an update for ever",
    "an update that was not provided for": "auto_dispatch_capture=True",
    "waiting for the device while capturing": "cannot be captured",
    "a gradient of what has none": "npu_add_rms_norm has no gradient",
}
SOUND = [
    "a norm",
    "a decode attention",
    "an attention to latents",
    "a cache write",
    "a training attention",
    "a sum",
    "a replay",
]


@pytest.mark.parametrize("call", REFUSED)
def test_a_broken_call_is_refused(npu, call):
    [sentence] = npu.run("refusal", 1, call)
    assert REFUSED[call] in sentence


@pytest.mark.parametrize("call", SOUND)
def test_the_same_call_unbroken_is_taken(npu, call):
    assert npu.run("refusal", 1, call) == [""]
