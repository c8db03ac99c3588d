"""Calls of torch_npu against the signatures of the oldest and the newest supported wheel."""

from __future__ import annotations

import pytest
import torch
from support.npu_contract import TABLE


@pytest.mark.parametrize("release", [TABLE.oldest, TABLE.newest], ids=["oldest", "newest"])
def test_every_signature_of_the_table_is_one_that_pytorch_reads(release):
    for name, signature in release.operators.items():
        assert torch._C.parse_schema(f"npu::{signature}").name == f"npu::{name}"
