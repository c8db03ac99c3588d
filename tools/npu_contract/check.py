"""Hold what the project uses of torch_npu to the table: one sentence for each fault."""

from __future__ import annotations

from npu_contract.binding import (
    Signature,
    drifts_of_call,
    faults_of_call,
    of_operator,
    of_python,
)
from npu_contract.calls import ROOT, Found, Use
from npu_contract.table import Table, TableRelease, table_name
from npu_contract.wheel import Definition

# Objects that may be passed on, since our sources call nothing on them where they arrive.
OPAQUE = {
    "torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options": "PyTorch reads it when it makes a group",
    "torch_npu.npu.Event": "a mark of EventTimer, which hands it back to torch_npu",
}


def faults(found: Found, table: Table) -> list[str]:
    """All faults of what a search has found; empty when all is well."""
    sentences = list(found.faults)
    for use in found.uses:
        sentences += [f"{use.where}: {fault}" for fault in faults_of_use(use, table)]
    return sentences


def faults_of_use(use: Use, table: Table) -> list[str]:
    """Faults of one use, in either release."""
    if table_name(use, table.oldest) is None and table_name(use, table.newest) is None:
        return []
    oldest = _definition(use, table.oldest)
    newest = _definition(use, table.newest)
    if use.passed_on:
        return _of_passing_on(use, oldest)
    if oldest is None or newest is None:
        release = table.oldest if oldest is None else table.newest
        return [
            f"{table_name(use, release) or use.name} is not in the table of torch_npu "
            f"{release.version}: run tools/torch_npu_contract.py on the wheels; what the table lacks "
            "then is not in that release"
        ]
    if use.call is None:
        return []
    return _of_call(use, table, oldest, newest)


def _definition(use: Use, release: TableRelease) -> Definition | None:
    name = table_name(use, release)
    return None if name is None else release.definition(name)


def _of_passing_on(use: Use, definition: Definition | None) -> list[str]:
    """An object, module or function that leaves the view of the search; a value may."""
    name = use.name.removesuffix("()")
    if name in OPAQUE or (definition is None and name != ROOT):
        return []  # a name that is not in the table is reported where it is read
    is_object = use.name.endswith("()")
    if not is_object and definition is not None and definition.kind in ("value", "binding"):
        return []
    return [
        f"passes {use.name} on to where calls of it are not seen: call torch_npu_module() or "
        "device_module() there, or keep the object in a private attribute of what uses it"
    ]


def _of_call(use: Use, table: Table, oldest: Definition, newest: Definition) -> list[str]:
    assert use.call is not None
    before = _signature(oldest)
    after = _signature(newest)
    if before is None or after is None:
        if use.call.args or use.call.keywords:
            return [f"{use.name}: its parameters are not known: call it without arguments"]
        return []
    wrong = []
    for release, signature in ((table.oldest, before), (table.newest, after)):
        for fault in faults_of_call(use.call, signature):
            wrong.append(f"{use.name} of torch_npu {release.version} {fault}")
    return wrong or [f"{use.name}: {fault}" for fault in drifts_of_call(use.call, before, after)]


def _signature(definition: Definition) -> Signature | None:
    if definition.signature is None:
        return None
    if definition.kind == "operator":
        return of_operator(definition.signature)
    return of_python(definition.signature)
