"""The actor: the policy that learns, by GRPO updates on the train ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from r1zero.algo.advantage import fill_advantages, whiten
from r1zero.algo.kl import KLCoefficient
from r1zero.algo.loss import LossTerms, Sums, microbatch_loss
from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.packing import Microbatch, TrainSample, balance_over_replicas, cut_microbatches
from r1zero.algo.stats import KL
from r1zero.config.schema import KlCtrl
from r1zero.distributed.collectives import all_max, all_sum
from r1zero.policy import optimizer
from r1zero.policy.actor_config import ActorConfig
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs, run_pipeline
from r1zero.types import Batch, Group, UpdateStats, joined


@dataclass(frozen=True, slots=True)
class Minibatch:
    """What one update learns from; the counts are those of all replicas together."""

    items: list[TrainSample]
    advantages: dict[int, float]  # by number of the item
    num_tokens: int  # that the loss masks leave
    num_sequences: int  # with at least one such token
    is_first: bool  # of its step: the weights are still those that drew the samples


class Actor:
    """The trained model, its optimizer, and what must be remembered during one global batch."""

    def __init__(self, model: RoleModel, cfg: ActorConfig) -> None:
        self.model = model
        self.cfg = cfg
        self.grid = model.grid
        self.stats = cfg.objective.loss.all_stats
        self.kl = _kl_coefficient(cfg.kl_ctrl)
        self._wrap()
        # Filled during a global batch.
        self._behaviour: list[torch.Tensor] | None = None  # the weights that drew the samples
        self._groups: dict[int, Group] = {}
        self._old_logprobs: dict[int, np.ndarray] = {}

    def begin(self, batch: Batch) -> None:
        """Start a global batch: remember the weights that will have drawn its samples."""
        self._groups.clear()
        self._old_logprobs.clear()
        if batch.num_minibatches * self.cfg.ppo_epochs > 1:
            parameters = list(self.model.module.parameters())
            if self._behaviour is None:
                self._behaviour = [torch.empty_like(p) for p in parameters]
            for kept, parameter in zip(self._behaviour, parameters, strict=True):
                kept.copy_(parameter.detach())

    def update(
        self, batch: Batch, minibatch: int, arrived: list[Group], epoch: int = 0
    ) -> UpdateStats | None:
        """Take one optimizer step on a minibatch. All train ranks hold all of `arrived`.

        None, and no step, when none of its groups trains.
        """
        fill_advantages(arrived, self.cfg.objective.advantage)
        for group in arrived:
            self._groups[group.position] = group
        part = self._minibatch(batch, minibatch, epoch)
        if not part.num_tokens:
            return None
        share = balance_over_replicas(part.items, self.grid.span.dp)[self.grid.replica]
        # An idle replica joins the collectives with a sample that counts nothing.
        weight = 1.0 if share else 0.0
        microbatches = cut_microbatches(
            share or part.items[:1], self.cfg.micro_batch_size, self.cfg.max_tokens_per_microbatch
        )
        if minibatch > 0 and epoch == 0:
            with self._behaviour_weights():
                self._old_logprobs |= compute_logprobs(
                    self.model, self.ddp, microbatches, self.cfg.temperature
                )
        return self._step(part, microbatches, weight)

    def finish(self, updates: list[UpdateStats | None], batch: Batch) -> list[Group]:
        """End a global batch: steer the KL coefficient, and hand out all groups in order."""
        taken = [update for update in updates if update is not None]
        if taken:
            kl = joined(taken, KL.key)
            self.kl.update(kl, batch.num_samples)
        return [self._groups[position] for position in sorted(self._groups)]

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """This rank's parameters by Megatron name with global layer numbers."""
        return self.model.parameters()

    # -- inside one update ----------------------------------------------------------------------

    def _minibatch(self, batch: Batch, minibatch: int, epoch: int) -> Minibatch:
        """Gather the samples of the groups that train, with their advantages and counts."""
        size = batch.samples_per_prompt
        items: list[TrainSample] = []
        for number in batch.samples_of(minibatch):
            group = self._groups[number // size]
            if group.trains:
                items.append(
                    TrainSample(number, group.position, group.prompt, group.samples[number % size])
                )
        lengths = [int(item.sample.mask.sum()) for item in items]
        values = [item.sample.advantage for item in items]
        assert np.isfinite(values).all(), f"advantages of a minibatch: {values}"
        if self.cfg.advantage_whiten and items:
            values = whiten(values, lengths).tolist()
        advantages = {item.number: float(value) for item, value in zip(items, values, strict=True)}
        num_sequences = sum(length > 0 for length in lengths)
        is_first = minibatch == 0 and epoch == 0
        return Minibatch(items, advantages, sum(lengths), num_sequences, is_first)

    def _step(
        self, part: Minibatch, microbatches: list[list[TrainSample]], weight: float
    ) -> UpdateStats:
        """One forward and backward pass over the microbatches, and one optimizer step."""
        terms = LossTerms(self.cfg.kl_penalty, self.kl.value, self.cfg.entropy_coeff)

        def loss(
            packed: Microbatch, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, Sums]:
            batch = self._loss_batch(part, packed, logprobs, entropy, weight)
            return microbatch_loss(batch, self.cfg.objective, terms)

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_pipeline(
            self.model, self.ddp, microbatches, self.cfg.temperature, loss, backward=True
        )
        self.scheduler.step(
            increment=1
        )  # before the update, so that a warm-up never wastes its first one
        with self.model.active():
            _, grad_norm, _ = self.optimizer.step()
        return self._reduce(sums, float(grad_norm), part.is_first)

    def _loss_batch(
        self,
        part: Minibatch,
        packed: Microbatch,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
        weight: float,
    ) -> LossBatch:
        """Lay what the samples bring beside what the policy says of their tokens."""
        samples = [item.sample for item in packed.items]
        ref_logprobs = [sample.ref_logprobs for sample in samples]
        advantages = [part.advantages[item.number] for item in packed.items]
        return LossBatch(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=self._old(packed, logprobs),
            ref_logprobs=packed.concat([values for values in ref_logprobs if values is not None]),
            rollout_logprobs=packed.concat([sample.logprobs for sample in samples]),
            advantages=packed.per_token(advantages),
            mask=packed.concat([sample.mask for sample in samples]) * weight,
            cu_seqlens=torch.tensor(
                packed.response_cu_seqlens, dtype=torch.int32, device=logprobs.device
            ),
            num_tokens=part.num_tokens,
            num_sequences=part.num_sequences,
        )

    def _old(self, packed: Microbatch, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probs under the weights that drew the samples: [R], no gradient."""
        numbers = [item.number for item in packed.items]
        if all(number in self._old_logprobs for number in numbers):
            return packed.concat([self._old_logprobs[number] for number in numbers])
        # The first update on these samples: the weights are still those that drew them.
        old = logprobs.detach()
        self._old_logprobs |= zip(numbers, packed.split(old), strict=True)
        return old

    def _reduce(self, parts: list[Sums], grad_norm: float, is_first: bool) -> UpdateStats:
        """Add up the sums of all replicas; only output ranks count, so TP and PP do not count
        twice."""
        assert self.grid.role_control is not None
        if self.grid.is_output_rank:
            sums = Sums.join(parts)
        else:
            sums = Sums.zeros(self.stats)
        all_sum(sums.added, self.grid.role_control)
        all_max(sums.largest, self.grid.role_control)
        tallies = sums.tallies(self.stats)
        for stat in self.stats:
            if stat.first_update and not is_first:
                del tallies[stat.key]
        lr = self.optimizer.param_groups[0]["lr"]
        return UpdateStats(tallies, sums.tokens, grad_norm, lr)

    @contextlib.contextmanager
    def _behaviour_weights(self) -> Iterator[None]:
        """Put back, for a moment, the weights that drew this batch. Takes one tensor more.

        Later minibatches arrive after the first updates; their old log-probs are still those of the
        weights that drew them. To wait for all samples first would stop the pipeline.
        """
        assert self._behaviour is not None
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._behaviour is not None
        for kept, parameter in zip(self._behaviour, self.model.module.parameters(), strict=True):
            current = parameter.clone()
            parameter.copy_(kept)
            kept.copy_(current)

    # -- set-up ---------------------------------------------------------------------------------

    def _wrap(self) -> None:
        """Wrap the model in Megatron's data parallelism and build its distributed optimizer."""
        model = self.model
        chosen = self.cfg.optimizer
        optimizer.install()
        with model.active():
            self.ddp = DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True, use_distributed_optimizer=True
                ),
                model.module,
                pg_collection=model.groups,
            )
            with self.grid.as_default_group():  # it gathers parameter names over the default group
                self.optimizer = get_megatron_optimizer(
                    MegatronOptimizerConfig(
                        optimizer="adam",
                        lr=chosen.lr,
                        min_lr=chosen.min_lr,
                        weight_decay=chosen.weight_decay,
                        adam_beta1=chosen.adam_beta1,
                        adam_beta2=chosen.adam_beta2,
                        adam_eps=chosen.adam_eps,
                        clip_grad=chosen.clip_grad,
                        bf16=model.dtype == torch.bfloat16,
                        params_dtype=model.dtype,
                        use_distributed_optimizer=True,
                    ),
                    [self.ddp],
                    use_gloo_process_groups=False,
                    pg_collection=model.groups,
                )

        # The loss is divided by the token count already, so Megatron's own division is left out.
        def finalize(modules: list[torch.nn.Module], _: object, **options: Any) -> None:
            finalize_model_grads(modules, None, **options)

        model.config.finalize_model_grads_func = finalize
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=chosen.lr,
            min_lr=chosen.min_lr,
            lr_warmup_steps=chosen.warmup_updates,
            lr_decay_steps=chosen.total_updates + 1,
            lr_decay_style=chosen.lr_decay_style,
            start_wd=chosen.weight_decay,
            end_wd=chosen.weight_decay,
            wd_incr_steps=chosen.total_updates + 1,
            wd_incr_style="constant",
        )


def _kl_coefficient(control: KlCtrl) -> KLCoefficient:
    if control.type == "adaptive":
        return KLCoefficient(control.kl_coef, control.target_kl, control.horizon)
    return KLCoefficient(control.kl_coef)
