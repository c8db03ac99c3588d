"""The list of operators with a kernel for NPUs, and what PyTorch makes of others."""

from __future__ import annotations

import pytest
from support.npu_contract import TABLE
from support.npu_kernels import missing_kernels


@pytest.mark.parametrize(
    "name",
    [
        "aten::add.Tensor",  # in the list
        "aten::mm",
        "aten::linear",  # made of others, which are in the list or not
        "aten::zeros",
        "aten::index.Tensor_out",  # what index.Tensor is made of where it has no kernel of its own
        "npu::npu_swiglu",  # torch_npu's own
    ],
)
def test_an_operator_that_a_device_can_run_is_not_missing(name):
    assert missing_kernels({name}) == []


def test_an_operator_without_a_kernel_is_named():
    absent = {"aten::no_such_operator", "aten::linalg_lstsq.out"}
    found = missing_kernels({*absent, "aten::add.Tensor"})
    assert found == ["linalg_lstsq.out", "no_such_operator"]


def test_an_inner_form_is_missing_where_one_of_its_outer_forms_is():
    """add.out stands for add.Tensor and add_.Tensor: which of them ran is not recorded."""
    assert missing_kernels({"aten::add.out"}, frozenset({"add.Tensor", "add_.Tensor"})) == []
    assert missing_kernels({"aten::add.out"}, frozenset({"add.Tensor"})) == ["add.out"]


def test_the_list_holds_what_both_releases_have():
    assert len(TABLE.kernels) > 1000
    assert {"index.Tensor", "_fused_adamw_", "multinomial"} <= TABLE.kernels
