"""torchair, which lies in torch_npu's wheel: the names that MindSpeed takes from it to register
converters of compiled graphs. All of them do nothing."""

from __future__ import annotations

import sys
import types


class _Anything:
    """Answers every attribute and call with itself, and stands in annotations."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_, **__):
        return self

    def __or__(self, _):
        return object

    def __ror__(self, _):
        return object


def _attribute(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything()


ge = types.ModuleType("torchair.ge")
ge.Tensor = object
ge.TensorSpec = object
ge.DataType = object
ge.__getattr__ = _attribute
sys.modules["torchair.ge"] = ge


def register_fx_node_ge_converter(*_, **__):
    """A decorator that changes nothing."""
    return lambda function: function
