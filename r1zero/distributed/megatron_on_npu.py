"""Megatron-core on Ascend NPUs: MindSpeed's adaptor, which patches Megatron as it is imported."""

from __future__ import annotations

import sys

from r1zero.distributed.torch_modules import torch_npu_module


def import_mindspeed() -> None:
    """Import torch_npu and MindSpeed's adaptor, hiding our command line from the adaptor.

    It parses sys.argv and would turn every flag it finds, ours too, into attributes of each
    TransformerConfig. And it replaces functions of torch.distributed, so the control plane takes
    its own first.
    """
    import r1zero.distributed.collectives  # noqa: F401

    torch_npu_module()
    argv = sys.argv
    sys.argv = [sys.argv[0], "--use-flash-attn"]
    try:
        import mindspeed.megatron_adaptor  # noqa: F401
    finally:
        sys.argv = argv
