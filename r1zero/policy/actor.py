"""The actor: the policy that learns, by GRPO updates on the train ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from r1zero.algo.advantage import group_advantages, whiten
from r1zero.algo.kl import KLCoefficient
from r1zero.algo.loss import STATS, LossTerms, grpo_loss
from r1zero.algo.packing import Microbatch, TrainSample, balance_over_replicas, cut_microbatches
from r1zero.config.schema import Config
from r1zero.distributed.collectives import all_max, all_sum
from r1zero.policy import optimizer
from r1zero.policy.megatron import RoleModel
from r1zero.policy.pipeline import compute_logprobs, run_pipeline
from r1zero.types import Batch, Group, UpdateStats


class Actor:
    """The trained model, its optimizer, and what must be remembered during one global batch."""

    def __init__(self, model: RoleModel, cfg: Config, total_updates: int) -> None:
        self.model = model
        self.cfg = cfg
        self.grid = model.grid
        self.kl = _kl_coefficient(cfg)
        self._wrap(total_updates)
        # Filled during a global batch.
        self._behaviour: list[torch.Tensor] | None = None  # the weights that drew the samples
        self._groups: dict[int, Group] = {}
        self._old_logprobs: dict[int, np.ndarray] = {}

    def begin(self, batch: Batch) -> None:
        """Start a global batch: remember the weights that will have drawn its samples."""
        self._groups.clear()
        self._old_logprobs.clear()
        if batch.num_minibatches * self.cfg.actor_rollout.ppo_epochs > 1:
            parameters = list(self.model.module.parameters())
            if self._behaviour is None:
                self._behaviour = [torch.empty_like(p) for p in parameters]
            for kept, parameter in zip(self._behaviour, parameters, strict=True):
                kept.copy_(parameter.detach())

    def update(
        self, batch: Batch, minibatch: int, arrived: list[Group], epoch: int = 0
    ) -> UpdateStats:
        """Take one optimizer step on a minibatch. All train ranks hold all of `arrived`."""
        for group in arrived:
            for sample, advantage in zip(
                group.samples, group_advantages(group.rewards), strict=True
            ):
                sample.advantage = float(advantage)
            self._groups[group.position] = group
        items = self._items(batch, minibatch)
        advantages = self._advantages(items)
        denominator = sum(len(item.sample.tokens) for item in items)
        share = balance_over_replicas(items, self.grid.span.dp)[self.grid.replica]
        # an idle replica joins the collectives with a sample that counts nothing
        weight = 1.0 if share else 0.0
        actor = self.cfg.actor_rollout
        microbatches = cut_microbatches(
            share or items[:1], actor.micro_batch_size, actor.max_tokens_per_microbatch
        )
        if minibatch > 0 and epoch == 0:
            with self._behaviour_weights():
                self._old_logprobs |= compute_logprobs(
                    self.model, self.ddp, microbatches, actor.temperature
                )
        return self._step(microbatches, advantages, weight, denominator)

    def finish(self, updates: list[UpdateStats], batch: Batch) -> list[Group]:
        """End a global batch: steer the KL coefficient, and hand out all groups in order."""
        tokens = sum(update.sums["tokens"] for update in updates)
        self.kl.update(sum(update.sums["kl"] for update in updates) / tokens, batch.num_samples)
        return [self._groups[position] for position in sorted(self._groups)]

    # -- inside one update ----------------------------------------------------------------------

    def _items(self, batch: Batch, minibatch: int) -> list[TrainSample]:
        size = batch.samples_per_prompt
        found = [(s, self._groups[s // size]) for s in batch.samples_of(minibatch)]
        return [
            TrainSample(s, group.position, group.prompt, group.samples[s % size])
            for s, group in found
        ]

    def _advantages(self, items: list[TrainSample]) -> dict[int, float]:
        values = [item.sample.advantage for item in items]
        assert np.isfinite(values).all(), f"advantages of a minibatch: {values}"
        if self.cfg.algorithm.advantage_whiten:
            values = whiten(values, [len(item.sample.tokens) for item in items])
        return {item.number: float(value) for item, value in zip(items, values, strict=True)}

    def _step(
        self,
        microbatches: list[list[TrainSample]],
        advantages: dict[int, float],
        weight: float,
        denominator: int,
    ) -> UpdateStats:
        terms = self._terms()

        def loss(batch: Microbatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple:
            items = batch.items
            rollout = batch.concat([item.sample.logprobs for item in items])
            if all(item.number in self._old_logprobs for item in items):
                old = batch.concat([self._old_logprobs[item.number] for item in items])
            else:  # first update on these samples: the weights are still those that drew them
                old = logprobs.detach()
                self._old_logprobs |= zip((item.number for item in items), batch.split(old))
            mask = torch.full_like(logprobs, weight)
            value, sums = grpo_loss(
                logprobs,
                entropy,
                old,
                batch.concat([item.sample.ref_logprobs for item in items]),
                rollout,
                batch.per_token([advantages[item.number] for item in items]),
                mask,
                denominator,
                terms,
            )
            return value, (sums, ((old - rollout).abs() * mask).max())

        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = run_pipeline(
            self.model,
            self.ddp,
            microbatches,
            self.cfg.actor_rollout.temperature,
            loss,
            backward=True,
        )
        # before the update, so that a warm-up never wastes its first one
        self.scheduler.step(increment=1)
        with self.model.active():
            _, grad_norm, _ = self.optimizer.step()
        return self._reduce(parts, float(grad_norm))

    def _reduce(
        self, parts: list[tuple[torch.Tensor, torch.Tensor]], grad_norm: float
    ) -> UpdateStats:
        """Add up the sums of all replicas; only the speakers count, so TP and PP do not count
        twice."""
        sums = torch.zeros(len(STATS), dtype=torch.float64)
        top = torch.zeros(1, dtype=torch.float64)
        if self.grid.is_output_rank:
            sums = torch.stack([part for part, _ in parts]).cpu().double().sum(0)
            top = torch.stack([worst for _, worst in parts]).cpu().double().max().reshape(1)
        all_sum(sums, self.grid.role_control)
        all_max(top, self.grid.role_control)
        lr = self.optimizer.param_groups[0]["lr"]
        return UpdateStats(dict(zip(STATS, sums.tolist(), strict=True)), float(top), grad_norm, lr)

    def _terms(self) -> LossTerms:
        actor = self.cfg.actor_rollout
        algorithm = self.cfg.algorithm
        if actor.clip_ratio_low is None:
            low = actor.clip_ratio
        else:
            low = actor.clip_ratio_low
        if actor.clip_ratio_high is None:
            high = actor.clip_ratio
        else:
            high = actor.clip_ratio_high
        return LossTerms(low, high, algorithm.kl_penalty, self.kl.value, actor.entropy_coeff)

    @contextlib.contextmanager
    def _behaviour_weights(self) -> Iterator[None]:
        """Put back, for a moment, the weights that drew this batch. Costs one tensor of extra
        memory.

        Later minibatches arrive after the first updates; their old log-probs are still those of the
        weights that drew them. The alternative, waiting for all samples first, would stop the
        pipeline.
        """
        assert self._behaviour is not None
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for kept, parameter in zip(self._behaviour, self.model.module.parameters(), strict=True):
            current = parameter.clone()
            parameter.copy_(kept)
            kept.copy_(current)

    # -- set-up ---------------------------------------------------------------------------------

    def _wrap(self, total_updates: int) -> None:
        """Wrap the model in Megatron's data parallelism and build its distributed optimizer."""
        model = self.model
        actor = self.cfg.actor_rollout
        bf16 = self.model.dtype == torch.bfloat16
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
                    OptimizerConfig(
                        optimizer="adam",
                        lr=actor.lr,
                        min_lr=actor.min_lr,
                        weight_decay=actor.weight_decay,
                        adam_beta1=actor.adam_beta1,
                        adam_beta2=actor.adam_beta2,
                        adam_eps=actor.adam_eps,
                        clip_grad=actor.clip_grad,
                        bf16=bf16,
                        params_dtype=model.dtype,
                        use_distributed_optimizer=True,
                    ),
                    [self.ddp],
                    use_gloo_process_groups=False,
                    pg_collection=model.groups,
                )
        # The token count was divided out in the loss already, so Megatron's own division is left
        # out.
        model.config.finalize_model_grads_func = lambda modules, _, **kwargs: finalize_model_grads(
            modules, None, **kwargs
        )
        warmup = actor.lr_warmup_iters or round(total_updates * (actor.lr_warmup_fraction or 0.0))
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=actor.lr,
            min_lr=actor.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=total_updates + 1,
            lr_decay_style=actor.lr_decay_style,
            start_wd=actor.weight_decay,
            end_wd=actor.weight_decay,
            wd_incr_steps=total_updates + 1,
            wd_incr_style="constant",
        )


def _kl_coefficient(cfg: Config) -> KLCoefficient:
    control = cfg.algorithm.kl_ctrl
    if control.type == "adaptive":
        return KLCoefficient(control.kl_coef, control.target_kl, control.horizon)
    return KLCoefficient(control.kl_coef)
