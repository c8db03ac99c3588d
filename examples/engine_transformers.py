"""An own rollout engine: transformers generates, one group at a time.

Every rank holds whole weights. Slow, and simple enough to check a fast engine with: it draws the
same tokens.

actor_rollout:
  engine: examples/engine_transformers.py:TransformersEngine
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.unused import blank, local_columns
from r1zero.rollout.interface import EngineListener, EngineSetup, RolloutProgress, Sampling
from r1zero.rollout.sampler import sample, uniforms
from r1zero.types import Batch, Group, Part, Sample


class TransformersEngine:
    """A `RolloutEngine` on a model of transformers. With tensor parallelism, every rank of a
    replica computes all of it."""

    layout: ClassVar[WeightLayout] = WeightLayout(names="hf", cut=False)

    @classmethod
    def build(cls, setup: EngineSetup) -> TransformersEngine:
        """Make the model of config.json, its weights not yet those to generate with."""
        config = AutoConfig.from_pretrained(setup.model_folder)
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
        return cls(model.to(setup.device).eval(), setup)

    def __init__(self, model: PreTrainedModel, setup: EngineSetup) -> None:
        self.version = -1
        self.listeners: list[EngineListener] = []
        self._model = model
        self._setup = setup
        self._target = WeightTarget(self.layout, file_tensors(model), self._commit)
        self._unused = local_columns(setup.unused, 0, setup.shape.vocab_size)
        self._request: tuple[Batch, Sampling, np.ndarray] | None = None
        self._waiting: list[int] = []  # positions
        self._done: dict[int, Group] = {}
        self._longest = 0
        self._tokens = 0

    def submit(
        self,
        batch: Batch,
        positions: Sequence[int],
        sampling: Sampling,
        budgets: np.ndarray | None = None,
    ) -> None:
        """Note the request; `collect` does the work."""
        assert not self._waiting, "the request before is not collected yet"
        if budgets is None:
            shape = (len(batch.prompts), batch.samples_per_prompt)
            budgets = np.full(shape, self._setup.config.max_response)
        self._request = (batch, sampling, budgets)
        self._waiting = list(positions)
        self._done.clear()
        self._tokens = 0

    def collect(self, part: Part) -> list[Group]:
        """Generate the groups at the positions of a part, one after the other; return its own."""
        assert self._request is not None, "nothing was asked for"
        batch, sampling, budgets = self._request
        for position in [p for p in self._waiting if p in part.positions]:
            group = Group.begun(position, batch.prompts[position], batch.samples_per_prompt)
            rows = [
                uniforms(
                    sampling.seed, *batch.random_key(position), member, budgets[position, member]
                )
                for member in range(batch.samples_per_prompt)
            ]
            self._generate(group, sampling, rows)
            self._waiting.remove(position)
            self._done[position] = group
        complete = [self._done[p] for p in part.positions if p in self._done]
        return [group for group in complete if group.longest in part.lengths]

    def progress(self) -> RolloutProgress:
        """In whole groups."""
        groups = len(self._done) + len(self._waiting)
        size = self._request[0].samples_per_prompt if self._request else 0
        return RolloutProgress(len(self._done) * size, groups * size, self._longest, self._tokens)

    def weights(self) -> WeightTarget:
        """The model's parameters: published weights are written into them as they are."""
        return self._target

    def _commit(self, version: int) -> None:
        self.version = version

    @torch.no_grad()
    def _generate(self, group: Group, sampling: Sampling, rows: list[np.ndarray]) -> None:
        """Draw the samples of a group together; `rows` has the uniform numbers of each."""
        tokens: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        running = list(range(len(rows)))
        cache = DynamicCache()
        inputs = torch.tensor(np.tile(group.prompt.tokens, (len(rows), 1)), dtype=torch.int64)
        self._longest = 0
        while running:
            logits = self._model(inputs.to(self._setup.device), past_key_values=cache).logits
            # a row that has ended goes on with its last number: nobody looks at what it draws
            numbers = [row[min(self._longest, len(row) - 1)] for row in rows]
            uniform = torch.tensor(numbers, device=logits.device)
            drawn, found = sample(blank(logits[:, -1], self._unused), uniform, sampling, None)
            inputs = drawn[:, None]
            self._longest += 1
            self._tokens += len(running)
            for member in list(running):
                tokens[member].append(int(drawn[member]))
                logprobs[member].append(float(found[member]))
                ended = tokens[member][-1] in self._setup.end_ids
                if ended or len(tokens[member]) == len(rows[member]):
                    running.remove(member)
                    self._finish(group, member, tokens[member], logprobs[member], not ended)
            for listener in self.listeners:
                listener.on_step()

    def _finish(
        self,
        group: Group,
        member: int,
        tokens: list[int],
        logprobs: list[float],
        truncated: bool,
    ) -> None:
        group.samples[member] = Sample(
            np.array(tokens, np.int32),
            np.array(logprobs, np.float32),
            truncated,
            self.version,
            loss_mask=np.ones(len(tokens), dtype=bool),
        )
        for listener in self.listeners:
            listener.on_sample(group, member)


def file_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The model's tensors by the names that its files have.

    transformers 5 keeps all experts of a layer in two tensors, [E, 2 F, H] and [E, H, F], where files
    have three for each expert. Those are views here: what is written to them lies in the model.
    """
    found = {}
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, gate_up in enumerate(parameter.detach()):
                gate, up = gate_up.chunk(2)
                found[f"{place}.{expert}.gate_proj.weight"] = gate
                found[f"{place}.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(parameter.detach()):
                found[f"{place}.{expert}.down_proj.weight"] = down
        else:
            found[name] = parameter
    return found
