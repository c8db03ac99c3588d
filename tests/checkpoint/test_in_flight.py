"""Groups that are on their way when a checkpoint is saved come back whole."""

from __future__ import annotations

import hashlib
import math
from dataclasses import fields

import numpy as np
import pytest
from safetensors.numpy import load_file

from r1zero.checkpoint import in_flight, manifest
from r1zero.errors import BadInput
from r1zero.types import Batch, Group, Outcome, Prompt, Sample, Score


def sample(length: int, seed: int) -> Sample:
    """A sample that rollout and reward have filled."""
    chance = np.random.default_rng(seed)
    return Sample(
        tokens=chance.integers(0, 150_000, length, dtype=np.int32),
        logprobs=-chance.random(length, dtype=np.float32),
        truncated=bool(seed % 2),
        version=seed,
        scores={
            "accuracy": Score(0.1 + seed, Outcome.RIGHT),
            "array": Score(math.pi, Outcome.CRASH, 'Fehler: "é"\n'),  # a name of the format's own
        },
        reward=1 / (seed + 3),
    )


def chance_routes(tokens: int, seed: int) -> np.ndarray:
    """Expert ids of so many tokens in 3 layers, uint8 [tokens, 3, 2]."""
    chance = np.random.default_rng(seed)
    return chance.integers(0, 256, (tokens, 3, 2), dtype=np.uint8)


def groups_of(*positions: int) -> list[Group]:
    """Groups that differ in every field, the first sample of each with all that may be missing."""
    found = []
    for position in positions:
        prompt = Prompt(
            position + 100,
            f"Wie viel ist {position} + 1?\u2028",
            np.arange(position + 1, dtype=np.int32),
            str(position + 1),
            row={"level": object()},  # whatever reward functions see: not for the disk
        )
        full = sample(5, position)
        full.ref_logprobs = -np.arange(5, dtype=np.float32)
        full.loss_mask = np.array([True, False, True, True, False])
        full.advantage = -0.3
        full.routes = chance_routes(4, position)
        samples = [full, sample(0, position + 1), sample(3, position + 2)]
        group = Group(position, prompt, samples, trains=position % 2 == 0)
        group.prompt_routes = chance_routes(position + 1, position + 50)
        found.append(group)
    return found


def assert_equal(found: object, expected: object, where: str) -> None:
    """Compare field by field, so that a field that is added later is compared, too."""
    assert type(found) is type(expected), where
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype and np.array_equal(found, expected), where
    elif isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found), where
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, pair in enumerate(zip(found, expected, strict=True)):
            assert_equal(*pair, f"{where}[{number}]")
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}[{key}]")
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):
            if field.name != "row":
                pair = getattr(found, field.name), getattr(expected, field.name)
                assert_equal(*pair, f"{where}.{field.name}")
    else:
        assert found == expected, where


def test_groups_of_all_replicas_come_back_in_order(tmp_path):
    files = in_flight.write(tmp_path, 1, groups_of(1, 3))
    files |= in_flight.write(tmp_path, 0, groups_of(0, 2, 4))
    files |= in_flight.write(tmp_path, 2, [])  # an idle replica
    found = in_flight.read(tmp_path, range(5))
    assert_equal(found, groups_of(0, 1, 2, 3, 4), "groups")
    assert all(group.prompt.row is None for group in found)
    assert sorted(files) == [f"in_flight/replica_000{number}.safetensors" for number in range(3)]
    for name, file in files.items():
        data = (tmp_path / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    found[0].samples[0].tokens[0] = 7  # arrays are the reader's own


def test_a_replica_reads_its_own_and_the_controller_prompts(tmp_path, monkeypatch):
    """And no routes of others, which can be gigabytes."""
    groups = groups_of(0, 1, 2, 3)
    in_flight.write(tmp_path, 0, groups[::2])
    in_flight.write(tmp_path, 1, groups[1::2])
    prompts = [group.prompt for group in groups]
    plan = in_flight.plan_of(Batch(1, 0, prompts, 3, 4))
    read = []
    filled = in_flight._filled

    def noting(value, arrays):
        result = filled(value, arrays)
        if isinstance(result, np.ndarray):
            read.append(result)
        return result

    monkeypatch.setattr(in_flight, "_filled", noting)
    assert_equal(in_flight.read(tmp_path, range(1, 4, 3)), groups[1:2], "groups")
    assert sum(array.nbytes for array in read) == in_flight.size(groups[1:2])
    read.clear()
    assert_equal(in_flight.read_batch(tmp_path, plan).prompts, prompts, "prompts")
    assert len(read) == 4, "the tokens of the prompts"


def test_their_size_is_that_of_the_tensors_in_the_file(tmp_path):
    groups = groups_of(0, 1, 2)
    [name] = in_flight.write(tmp_path, 0, groups)
    tensors = load_file(tmp_path / name)
    del tensors["text"]
    assert in_flight.size(groups) == sum(tensor.nbytes for tensor in tensors.values())


def test_a_checkpoint_without_such_groups_has_none(tmp_path):
    assert in_flight.read(tmp_path, range(5)) == []


def test_a_damaged_file_is_refused(tmp_path):
    in_flight.write(tmp_path, 0, groups_of(0))
    path = tmp_path / "in_flight" / "replica_0000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    with pytest.raises(BadInput, match=f"{path} cannot be read"):
        in_flight.read(tmp_path, range(1))
    path.write_bytes(data.replace(b'"position"', b'"positiom"'))
    with pytest.raises(BadInput, match=f"{path} cannot be read"):
        in_flight.read(tmp_path, range(1))


def test_the_manifest_holds_them_to_their_sums(tmp_path):
    manifest.write(tmp_path, in_flight.write(tmp_path, 0, groups_of(0)))
    manifest.check_sizes(tmp_path)
    path = tmp_path / "in_flight" / "replica_0000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match=f"{path} differs from what was saved"):
        manifest.check_sums(tmp_path, ["in_flight/replica_0000.safetensors"])
