"""vLLM as a rollout engine: scheduling, KV cache and forward passes are vLLM's, in our process.

Weights are written in place into its parameters, and the draw of a token is ours, so samples are
those of the native engine. Imports no vLLM before an engine is built, since every rank of a job asks
for its layout.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from r1zero.distributed.collectives import all_max
from r1zero.distributed.variables import set_variables
from r1zero.errors import BadInput
from r1zero.models.layout import WeightLayout, WeightTarget
from r1zero.models.unused import local_columns
from r1zero.rollout.interface import EngineListener, EngineSetup, RolloutProgress, Sampling
from r1zero.rollout.sampler import uniforms
from r1zero.rollout.scheduler import PartialSample, SampleId
from r1zero.rollout.vllm.refusals import refusal
from r1zero.rollout.vllm.weights import hf_views
from r1zero.types import Batch, Group, Part, Sample

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

# What holds whatever the user has set: the scheduler in this process, the model runner that has a
# batch as sampler.py reads it, and on NPUs weights in a layout that may be written in place.
NEEDED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ASCEND_ENABLE_NZ": "0",
}
# What holds unless the user has set it: nothing goes to or comes from the network, and warnings that
# a run of ours cannot heed are not told on every rank.
WISHED = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VllmEngine:
    """A `RolloutEngine` on vLLM, which holds Hugging Face's tensors cut by the rollout role's TP."""

    layout: ClassVar[WeightLayout] = WeightLayout(names="hf", cut=True)

    @classmethod
    def build(cls, setup: EngineSetup) -> VllmEngine:
        """Make an engine without weights. BadInput for models that vLLM does not take here."""
        found = refusal(setup.shape, setup.grid.span.tp, setup.device.type)
        if found is not None:
            raise BadInput(found)
        set_variables(NEEDED, WISHED)
        from r1zero.rollout.vllm.host import start

        return cls(start(setup), setup)

    def __init__(self, vllm: LLMEngine, setup: EngineSetup) -> None:
        from r1zero.rollout.vllm.host import runner_of
        from r1zero.rollout.vllm.sampler import CounterSampler, Drawing

        self.version = -1
        self.listeners: list[EngineListener] = []
        self._vllm = vllm
        self._setup = setup
        runner = runner_of(vllm)
        parameters = dict(runner.get_model().named_parameters())
        views = hf_views(parameters, setup.shape, setup.grid.span.tp)
        self._target = WeightTarget(self.layout, views, self._commit)
        self._drawing = Drawing(Sampling(1.0, 1.0, 0, 0))  # of no request yet
        unused = local_columns(setup.unused, 0, setup.shape.vocab_size)
        runner.sampler = CounterSampler(runner, self._drawing, unused)
        self._groups: dict[int, Group] = {}
        self._open: dict[int, int] = {}  # members of a group that are not finished
        self._longest: dict[int, int] = {}  # tokens of a group's longest finished response
        self._tokens = 0  # of finished samples

    def submit(
        self,
        batch: Batch,
        positions: Sequence[int],
        sampling: Sampling,
        budgets: np.ndarray | None = None,
    ) -> None:
        """Queue the samples of the prompts at these positions; see `RolloutEngine`."""
        from r1zero.rollout.vllm.host import add_request

        assert not any(self._open.values()), "the request before is not collected yet"
        size = batch.samples_per_prompt
        if budgets is None:
            budgets = np.full((len(batch.prompts), size), self._setup.config.max_response)
        self._drawing.sampling = sampling
        self._tokens = 0
        self._groups = {p: Group.begun(p, batch.prompts[p], size) for p in positions}
        self._open = dict.fromkeys(positions, size)
        self._longest = dict.fromkeys(positions, 0)
        for position in positions:
            prompt = batch.prompts[position].tokens.tolist()
            key = batch.random_key(position)
            for member in range(size):
                budget = int(budgets[position, member])
                numbers = uniforms(sampling.seed, *key, member, budget)
                name = f"{position}/{member}"
                self._drawing.samples[name] = PartialSample.fresh(
                    SampleId(position, member), numbers
                )
                add_request(self._vllm, name, prompt, budget, self._setup.end_ids)

    @torch.inference_mode()
    def collect(self, part: Part) -> list[Group]:
        """Step until the groups of the part are complete, keeping vLLM busy with all others."""
        positions = [p for p in part.positions if p in self._groups]
        while self._undecided(positions, part):
            for output in self._vllm.step():
                if output.finished:
                    self._finish(output.request_id, output.outputs[0].token_ids)
            for listener in self.listeners:
                listener.on_step()
        complete = [self._groups[p] for p in positions if not self._open[p]]
        groups = [group for group in complete if group.longest in part.lengths]
        self._compare(groups)
        return groups

    def progress(self) -> RolloutProgress:
        """How far the request is."""
        total = sum(len(group.samples) for group in self._groups.values())
        running = [each.count for each in self._drawing.samples.values()]
        return RolloutProgress(
            done=total - sum(self._open.values()),
            total=total,
            longest=max(running, default=0),
            tokens=self._tokens + sum(running),
        )

    def weights(self) -> WeightTarget:
        """vLLM's parameters."""
        return self._target

    def _commit(self, version: int) -> None:
        """Take note that weights of this version were written, and forget what was computed with
        those before: prompts would go on from their keys and values, and nothing would show it."""
        assert not any(self._open.values()), (
            "weights may not change while samples are drawn with them"
        )
        if not self._vllm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM did not empty its prefix cache after new weights: it still holds blocks of "
                "requests that are through"
            )
        self.version = version

    def _undecided(self, positions: Sequence[int], part: Part) -> bool:
        """Whether a group at these positions may still turn out to belong to the part: it is not
        complete, and none of its responses is too long for it."""
        waits = {p for p in positions if self._open[p] and self._longest[p] < part.lengths.stop}
        for each in self._drawing.samples.values():
            if each.count >= part.lengths.stop:
                waits.discard(each.sample_id.position)
        return bool(waits)

    def _finish(self, name: str, tokens: Sequence[int]) -> None:
        """Take a sample that is complete."""
        drawn = self._drawing.samples.pop(name)
        count = len(tokens)
        assert drawn.tokens[:count].tolist() == list(tokens), f"vLLM kept other tokens of {name}"
        position = drawn.sample_id.position
        group = self._groups[position]
        group.samples[drawn.sample_id.member] = Sample(
            drawn.tokens[:count].copy(),
            drawn.logprobs[:count].copy(),
            truncated=tokens[-1] not in self._setup.end_ids,
            version=self.version,
            loss_mask=np.ones(count, dtype=bool),
        )
        self._open[position] -= 1
        self._longest[position] = max(self._longest[position], count)
        self._tokens += count
        for listener in self.listeners:
            listener.on_sample(group, drawn.sample_id.member)

    def _compare(self, groups: Sequence[Group]) -> None:
        """See that all ranks of the replica drew the same. RuntimeError if they did not: each would
        go on from tokens of its own, in one model."""
        control = self._setup.grid.replica_control
        assert control is not None, "every replica has its control group"
        drawn = [sample.tokens for group in groups for sample in group.samples]
        checksum = zlib.crc32(np.concatenate([np.zeros(0, np.int32), *drawn]).tobytes())
        largest, smallest = all_max(torch.tensor([checksum, -checksum]), control).tolist()
        if largest != -smallest:
            raise RuntimeError(
                "vLLM drew different tokens on the ranks of one replica; its all-reduce must give "
                "all of them the same bits"
            )
