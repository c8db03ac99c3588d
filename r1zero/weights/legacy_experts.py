"""Experts in Megatron's legacy files: one or more matrices of each, named by its three modules for
them.

E experts in a file, each with F rows of gate above F rows of up:

    SequentialMLP    mlp.experts.local_experts.{e}.linear_fc1.weight            [2 F, H]
                     mlp.experts.local_experts.{e}.linear_fc2.weight            [H, F]
    TEGroupedMLP     mlp.experts.linear_fc1.weight{e}, linear_fc2.weight{e}     the same
    GroupedMLP       mlp.experts.weight1    [H, E 2 F], whose memory is [E, H, 2 F]
                     mlp.experts.weight2    [E F, H], whose memory is [E, F, H]

Experts are counted from the first of the file. Expert tensor parallelism cuts F, into one part or as
many as TP has; a TP rank's file then has its part of each expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import torch

from r1zero.models.params import ParamSpec
from r1zero.weights.source import FLOATS, StoredPiece

State = dict[str, torch.Tensor]
GROUPED = {"linear_fc1": "weight1", "linear_fc2": "weight2"}  # what GroupedMLP calls them
FFN_AXIS = 2  # of the view of either tensor: (E, 2, F, H) and (E, H, F)


def take_pieces(
    tensor: ParamSpec, files: Mapping[tuple[int, int], State], tp: int, ep: int
) -> list[StoredPiece]:
    """Take a layer's experts out of all files, which are given by TP and EP index.

    Matrices of another shape are left out: `problems` then says that something is missing.
    """
    count = tensor.view[0] // ep
    pieces: dict[tuple[int, int], StoredPiece] = {}
    for (tp_index, ep_index), state in files.items():
        for number, matrix in enumerate(_take(state, tensor.name, count)):
            part = _view(tensor, matrix, tp)
            if part is not None:
                expert = ep_index * count + number
                cut = part.shape[FFN_AXIS] < tensor.view[FFN_AXIS]
                start = tp_index * part.shape[FFN_AXIS] if cut else 0
                pieces[expert, start] = _piece(part, expert, start)
    return list(pieces.values())


def problems(tensor: ParamSpec, pieces: list[StoredPiece]) -> list[str]:
    """Say what is wrong with the pieces of a tensor of experts."""
    if not pieces:
        return [f"{tensor.name} is missing"]
    parts = [piece.load() for piece in pieces]
    found = sum(part.numel() for part in parts)
    wanted = prod(tensor.view)
    if found != wanted:
        return [f"{tensor.name} has {found} elements that fit instead of {wanted}"]
    others = sorted({str(part.dtype) for part in parts if part.dtype not in FLOATS})
    return [f"{tensor.name} has the type {dtype}, which is no float" for dtype in others]


def sequential(name: str, experts: torch.Tensor) -> State:
    """Experts [E, out, in], whose name is ours, as SequentialMLP names them."""
    head, module = _split(name)
    return {
        f"{head}.local_experts.{number}.{module}.weight": matrix
        for number, matrix in enumerate(experts)
    }


def grouped(name: str, experts: torch.Tensor) -> tuple[str, torch.Tensor]:
    """What GroupedMLP makes of experts [E, out, in], whose name is ours: its name, and a matrix."""
    head, module = _split(name)
    turned = experts.transpose(1, 2).contiguous()  # [E, in, out]
    if module == "linear_fc1":
        folded = turned.view(turned.shape[1], -1)
    else:
        folded = turned.view(-1, turned.shape[2])
    return f"{head}.{GROUPED[module]}", folded


def _split(name: str) -> tuple[str, str]:
    """The module of all experts, and the one in each of them.

    >>> _split("decoder.layers.3.mlp.experts.linear_fc1.weight")
    ('decoder.layers.3.mlp.experts', 'linear_fc1')
    """
    head, module, _ = name.rsplit(".", 2)
    return head, module


def _take(state: State, name: str, count: int) -> list[torch.Tensor]:
    """Take the matrices of `count` experts out of one file; `name` is ours, of all of them."""
    head, module = _split(name)
    folded = state.pop(f"{head}.{GROUPED[module]}", None)
    if folded is not None:
        return _ungrouped(module, folded, count)
    found = []
    for expert in range(count):
        sequential = state.pop(f"{head}.local_experts.{expert}.{module}.weight", None)
        fused = state.pop(f"{head}.{module}.weight{expert}", None)
        found += [matrix for matrix in (sequential, fused) if matrix is not None]
    return found


def _ungrouped(module: str, folded: torch.Tensor, count: int) -> list[torch.Tensor]:
    """The matrices [out, in] in what GroupedMLP keeps; nothing if it is not of so many experts."""
    hidden = folded.shape[0 if module == "linear_fc1" else -1]
    if folded.dim() != 2 or folded.numel() % (count * hidden):
        return []
    if module == "linear_fc1":
        turned = folded.view(count, hidden, -1)
    else:
        turned = folded.view(count, -1, hidden)
    return [matrix.t() for matrix in turned]


def _view(tensor: ParamSpec, matrix: torch.Tensor, tp: int) -> torch.Tensor | None:
    """One expert's matrix as its part of the view, (1, 2, f, H) or (1, H, f); None if it is of
    another shape.

    f is F, or F / TP.
    """
    ffn = tensor.view[FFN_AXIS]
    for size in {ffn, ffn // tp}:
        wanted = [1, *tensor.view[1:]]
        wanted[FFN_AXIS] = size
        folded = (wanted[1] * wanted[2], wanted[3]) if len(wanted) == 4 else tuple(wanted[1:])
        if tuple(matrix.shape) == folded:
            return matrix.view(wanted)
    return None


def _piece(part: torch.Tensor, expert: int, start: int) -> StoredPiece:
    """`start` is its first row, or column, of F."""
    box = [slice(0, size) for size in part.shape]
    box[0] = slice(expert, expert + 1)
    box[FFN_AXIS] = slice(start, start + part.shape[FFN_AXIS])
    return StoredPiece(tuple(box), partial(part.detach))
