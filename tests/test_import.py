"""Reading Megatron checkpoints: what megatron-core wrote gives the same logits here, and damage gives a sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from megatron_checkpoints import TOKENS, write_body
from multiproc import DEVICE, run_ranks
from test_parity import make_world

from r1zero.algo.packing import Item, pack
from r1zero.batch import Prompt, Sample
from r1zero.model import ModelShape
from r1zero.policy.megatron import RoleModel


@pytest.fixture(scope="module", params=["untied", "tied"])
def written(request, tmp_path_factory):
    """(folder with legacy and dist checkpoints, the writer's logits [T, V])."""
    folder = tmp_path_factory.mktemp(request.param)
    logits = run_ranks(write_body, 4, str(folder), request.param == "tied")
    return folder, next(part for part in logits if part is not None)[0]


def logits_body(rank, size, store, folder):
    """This rank's columns of the logits by kind of checkpoint."""
    world, found = make_world(rank, size, store, (size, 1)), {}
    tokens = TOKENS[0].numpy().astype(np.int32)
    item = Item(0, 0, Prompt(0, "", tokens, ""), Sample(tokens[:1], np.zeros(1, np.float32), False, 0))
    batch = pack([item], torch.device("cpu"))
    for kind in ("legacy", "dist"):
        shape = ModelShape.from_folder(folder / kind)
        model = RoleModel(shape, world.train, DEVICE, torch.float32, 64, False, False, seed=1)
        model.load(str(folder / kind))
        with torch.no_grad(), model.active():
            hidden = model.hidden(batch)
        found[kind] = (hidden[:, 0] @ model.module.head_weight().t())[:TOKENS.shape[1]]
    return found


@pytest.mark.parametrize("tp", [1, 4])
def test_checkpoints_of_megatron_core_give_its_logits(written, tp):
    folder, expected = written
    ranks = run_ranks(logits_body, tp, folder)
    for kind in ("legacy", "dist"):
        found = torch.cat([part[kind] for part in ranks], dim=1)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
