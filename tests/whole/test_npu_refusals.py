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
SOUND = ["a norm", "a decode attention", "a training attention", "a sum", "a replay"]


@pytest.mark.parametrize("call", REFUSED)
def test_a_broken_call_is_refused(npu, call):
    [sentence] = npu.run("refusal", 1, call)
    assert REFUSED[call] in sentence


@pytest.mark.parametrize("call", SOUND)
def test_the_same_call_unbroken_is_taken(npu, call):
    assert npu.run("refusal", 1, call) == [""]
