"""Rows of the vocabulary that no token has: which they are, and that they have no part in
anything."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.model_folders import holed, padded, read_rows
from support.multiproc import run_ranks
from support.patience import LONG
from support.worlds import SHORT, metrics, run, samples
from tokenizers import AddedToken, Tokenizer, models

from r1zero.data.vocabulary import Vocabulary
from r1zero.errors import BadInput
from r1zero.models.unused import local_columns
from r1zero.observe import invariants
from r1zero.observe.sample_summary import summarize
from r1zero.policy import logprobs
from r1zero.policy.logprobs import token_logprobs
from r1zero.types import Group, Prompt, Sample


def vocabulary(vocab: dict[str, int], *added: str) -> Vocabulary:
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.add_tokens([AddedToken(text) for text in added])
    return Vocabulary(tokenizer, None)


def test_unused_ids_are_those_of_no_token() -> None:
    assert vocabulary({"a": 0, "b": 1}).unused(2) == ()
    assert vocabulary({"a": 0, "b": 1}, "<x>").unused(6) == (range(3, 6),)
    assert vocabulary({"a": 2, "b": 3, "c": 7}).unused(10) == (
        range(2),
        range(4, 7),
        range(8, 10),
    )
    with pytest.raises(BadInput, match="ids up to 7, but the model's embedding has 7 rows"):
        vocabulary({"a": 2, "b": 7}).unused(7)


def test_each_rank_has_its_part_of_them() -> None:
    unused = (range(3, 5), range(7, 12))
    assert local_columns(unused, 0, 12) == (slice(3, 5), slice(7, 12))
    assert [local_columns(unused, first, 4) for first in (0, 4, 8)] == [
        (slice(3, 4),),
        (slice(0, 1), slice(3, 4)),
        (slice(0, 4),),
    ]


def look_body(
    rank: int,
    size: int,
    store: object,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    unused: tuple[range, ...],
) -> list[torch.Tensor]:
    """Log-probs, entropy, and the gradients of a sum of both, of this rank's rows."""
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=LONG)
    )
    logprobs.LOGIT_CHUNK_ELEMENTS = 100  # two tokens a chunk, or four
    hidden, rows = hidden.clone().requires_grad_(), len(weight) // size
    part = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    columns = local_columns(unused, rank * rows, rows)
    found, entropy = token_logprobs(hidden, part, targets, 0.7, dist.group.WORLD, columns)
    (found.sum() + 0.3 * entropy.sum()).backward()
    dist.all_reduce(hidden.grad)
    return [found.detach(), entropy.detach(), hidden.grad, part.grad]


@pytest.mark.parametrize(
    "unused", [(range(40, 48),), (range(2, 5), range(20, 48))], ids=["padding", "holes"]
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_gradients_are_those_of_a_masked_softmax(size: int, unused: tuple[range, ...]) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(9, 6), torch.randn(48, 6), torch.randint(5, 20, (9,))
    ids = [number for part in unused for number in part]
    weight[ids] *= 20
    results = run_ranks(look_body, size, hidden, weight, targets, unused)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    kept = np.setdiff1d(np.arange(48), ids)
    # the softmax of a model without these rows
    logp = torch.log_softmax(h @ w[kept].t() / 0.7, dim=-1)
    chosen = logp.gather(1, torch.from_numpy(np.searchsorted(kept, targets.numpy()))[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    (chosen.sum() + 0.3 * entropy.sum()).backward()
    for found, expected in zip(results[0][:3], (chosen, entropy, h.grad), strict=True):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    grad = torch.cat([result[3] for result in results])
    torch.testing.assert_close(grad.double(), w.grad, rtol=1e-5, atol=1e-5)
    assert (grad[ids] == 0).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda tiny, folder: padded(tiny, folder, 512),
        lambda tiny, folder: holed(tiny, folder, 262, 20),
    ],
    ids=["padded", "holed"],
)
def test_a_run_is_the_same_whatever_lies_in_rows_without_a_token(
    tmp_path: Path, tiny: Path, make
) -> None:
    """Texts, metrics and the trained rows of the tokens are those of the model without these
    rows."""
    folder = make(tiny, tmp_path / "model")
    expected = run(tmp_path / "tiny", 1, "tiny", SHORT)
    found = run(tmp_path / "found", 1, "tiny", [*SHORT, f"actor_rollout.load={folder}"])
    for step in (1, 2):
        drawn = [
            (row["response"], row["response_length"], row["reward"]) for row in samples(found, step)
        ]
        assert drawn == [
            (row["response"], row["response_length"], row["reward"])
            for row in samples(expected, step)
        ]
        for key in ("loss", "entropy", "kl", "grad_norm"):
            ours, theirs = metrics(found)[step - 1][key], metrics(expected)[step - 1][key]
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5), key
    exported, start = read_rows(found / "model"), read_rows(folder)
    assert exported.shape == start.shape
    unused = [
        number for part in Vocabulary.from_folder(folder).unused(len(start)) for number in part
    ]
    # the tiny job decays no weights
    torch.testing.assert_close(exported[unused], start[unused], rtol=0, atol=0)


def test_a_sample_with_an_id_of_no_token_breaks_an_invariant() -> None:
    unused = (range(3, 5), range(9, 12))
    group = Group(
        0,
        Prompt(0, "", np.arange(3), ""),
        [
            Sample(np.array(tokens), np.zeros(4, np.float32), False, 0, reward=0.0)
            for tokens in ([0, 2, 5, 8], [1, 1, 2, 12])
        ],
    )
    assert invariants._unused(summarize([group], unused)) == []
    group.samples[1].tokens[2:] = 4, 11
    [problem] = invariants._unused(summarize([group], unused))
    assert problem.startswith(
        "2 of 8 response tokens have ids that the tokenizer knows no token for"
    )
