"""The actor: the policy that learns, by GRPO updates on the train ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

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

from r1zero.algo.advantages import advantages_of
from r1zero.algo.aggregation import UpdateSamples, sample_weights
from r1zero.algo.dealing import Deal, SampleTable
from r1zero.algo.entropy import EntropyCoefficient
from r1zero.algo.group_table import GroupTable
from r1zero.algo.kl import KLCoefficient
from r1zero.algo.lockstep import fill_up, most_microbatches
from r1zero.algo.loss import LossTerms, Sums, microbatch_loss
from r1zero.algo.loss_batch import LossBatch
from r1zero.algo.packing import Microbatch, TrainSample, cut_microbatches
from r1zero.algo.stats import (
    ENTROPY,
    ENTROPY_COEFFICIENT,
    FIRST_DRIFT,
    KL,
    KL_COEFFICIENT,
    OF_CORRECTION,
    OF_MISMATCH,
    ROUTER_AGREEMENT,
)
from r1zero.algo.whitening import whiten
from r1zero.config.schema import EntropyCtrl, KlCtrl
from r1zero.distributed.collectives import all_max, all_sum
from r1zero.policy import optimizer
from r1zero.policy.actor_config import ActorConfig
from r1zero.policy.handover import Delivery
from r1zero.policy.lora import Adapters
from r1zero.policy.megatron import RoleModel
from r1zero.policy.offload import OffloadedState
from r1zero.policy.pipeline import compute_logprobs, logprob_step, run_pipeline
from r1zero.types import Batch, Tally, UpdateStats, joined


@dataclass(slots=True)
class Update:
    """An update that grows: what its samples gave so far, on this rank or over all replicas."""

    is_first: bool  # of its step: the weights are still those of its start
    num_tokens: int = 0  # of all replicas, that are learnt from
    # Of the aggregation, for the samples of all replicas: by number, and what they are divided by.
    weights: dict[int, float] = field(default_factory=dict)
    denominator: float = 0.0
    sums: list[Sums] = field(default_factory=list)  # of this replica's microbatches


class Actor:
    """The trained model, its optimizer, and what must be remembered during one global batch."""

    def __init__(
        self, model: RoleModel, cfg: ActorConfig, adapters: Adapters | None = None
    ) -> None:
        """With `adapters`, which lie in `model`, they learn in place of its weights."""
        self.model = model
        self.adapters = adapters
        self.cfg = cfg
        self.grid = model.grid
        self.stats = cfg.objective.loss.all_stats
        self.kl = _kl_coefficient(cfg.kl_ctrl)
        self.entropy = _entropy_coefficient(cfg.entropy_coeff, cfg.entropy_ctrl)
        # Of every sample of the batch, [P, G], equal on all train ranks.
        self.advantages = np.zeros((0, 0))  # float64, not a number until known
        self._wrap()
        # Filled during a global batch.
        self._batch: Batch | None = None
        self._behaviour: list[torch.Tensor] | None = None  # the weights at its start
        self._deliveries: list[Delivery] = []
        self._old_logprobs: dict[int, np.ndarray] = {}
        self._update = Update(is_first=True)
        self._moved = False  # the weights, since its start

    def begin(self, batch: Batch) -> None:
        """Start a global batch: remember the weights that its old log-probs are taken under."""
        self._batch = batch
        self._moved = False
        self._deliveries.clear()
        self._old_logprobs.clear()
        self.advantages = np.zeros((0, batch.samples_per_prompt))
        self.go_on(batch)
        if batch.num_minibatches > 1 and self.cfg.old_logprobs == "recompute":
            if self._behaviour is None:
                self._behaviour = [torch.empty_like(p) for p in self._learning()]
            for kept, parameter in zip(self._behaviour, self._learning(), strict=True):
                kept.copy_(parameter.detach())

    def go_on(self, batch: Batch) -> None:
        """Take the plan of the next round of the batch: it has more prompts."""
        self._batch = batch
        more = len(batch.prompts) - len(self.advantages)
        unknown = np.full((more, batch.samples_per_prompt), np.nan)
        self.advantages = np.concatenate([self.advantages, unknown])

    def learn(self, delivery: Delivery) -> list[UpdateStats | None]:
        """Learn from what has come. Returns the update that it completes, if it does.

        That is None, and no step is taken, when nothing of it trains.
        """
        groups = delivery.deal.groups
        objective = self.cfg.objective
        self.advantages[groups.positions] = advantages_of(
            self._group_table(groups), objective.advantage, objective.advantage_settings
        )
        self._whiten(delivery.deal)
        self._deliveries.append(delivery)
        return self._learn(delivery, epoch=0)

    def learn_again(self, epoch: int) -> list[UpdateStats | None]:
        """Learn once more from the whole batch, in the same order. The first epoch after `learn` is 1."""
        updates = []
        for delivery in self._deliveries:
            updates += self._learn(delivery, epoch)
        return updates

    def finish(self, updates: list[UpdateStats | None], batch: Batch) -> None:
        """End a global batch: steer the coefficients of KL and entropy."""
        taken = [update for update in updates if update is not None]
        if not taken:
            return
        self.entropy.update(joined(taken, ENTROPY.key))
        if batch.reference_version is not None:
            learnt = sum(len(delivery.deal.numbers) for delivery in self._deliveries)
            self.kl.update(joined(taken, KL.key), learnt)

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """This rank's parameters by Megatron name with global layer numbers, adapters merged."""
        if self.adapters is not None:
            return self.adapters.merged()
        return self.model.parameters()

    def adapter_parameters(self) -> Mapping[str, torch.Tensor]:
        """This rank's part of the adapters by name; empty where all weights learn."""
        if self.adapters is None:
            return {}
        return self.adapters.parameters()

    def _learning(self) -> list[torch.nn.Parameter]:
        """What an update changes: all parameters, or those of the adapters."""
        return [p for p in self.model.module.parameters() if p.requires_grad]

    # -- inside one update ----------------------------------------------------------------------

    def _learn(self, delivery: Delivery, epoch: int) -> list[UpdateStats | None]:
        """Add the gradients of a delivery to its update, and take the step if it is complete."""
        assert self._batch is not None
        deal = delivery.deal
        if deal.is_first:
            self._update = Update(is_first=not self._moved)
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
        update = self._update
        learnt = int(deal.counted[deal.trains].sum())
        update.num_tokens += learnt
        self._weigh(deal)
        if learnt:
            microbatches = self._microbatches(delivery)
            if self._moved and epoch == 0 and self.cfg.old_logprobs == "recompute":
                self._look_back(microbatches)
            if epoch == 0 and self.cfg.base_is_reference:
                self._look_at_base(microbatches)
            self._add_gradients(deal, microbatches)
        if epoch + 1 == self._batch.epochs:
            delivery.forget_routes()
        if not deal.is_last:
            return []
        return [self._take_step() if update.num_tokens else None]

    def _microbatches(self, delivery: Delivery) -> list[list[TrainSample]]:
        """This replica's samples, in as many microbatches as every other replica has."""
        max_samples = self.cfg.micro_batch_size
        max_tokens = self.cfg.max_tokens_per_microbatch
        own = cut_microbatches(self._items(delivery), max_samples, max_tokens)
        return fill_up(own, most_microbatches(delivery.deal.sizes, max_samples, max_tokens))

    def _items(self, delivery: Delivery) -> list[TrainSample]:
        """This replica's samples."""
        assert self._batch is not None
        size = self._batch.samples_per_prompt
        items = []
        for number in delivery.deal.shares[self.grid.replica]:
            position = number // size
            prompt = self._batch.prompts[position]
            sample = delivery.samples[number]
            routes = delivery.prompt_routes.get(position)
            items.append(TrainSample(number, position, prompt, sample, routes))
        return items

    def _look_back(self, microbatches: list[list[TrainSample]]) -> None:
        """Compute the old log-probs of samples that come after the first update of their batch."""
        agreement = self.model.router_agreement
        with self._behaviour_weights(), agreement.counting(with_gradients=False):
            self._old_logprobs |= compute_logprobs(
                self.model, self.ddp, microbatches, self.cfg.temperature
            )

    def _look_at_base(self, microbatches: list[list[TrainSample]]) -> None:
        """Compute the reference log-probs of samples, with the adapters switched off. The last stage
        has them. Its routers choose themselves, as those of any reference."""
        assert self.adapters is not None
        free = [[item.without_routes() for item in microbatch] for microbatch in microbatches]
        with self.adapters.disabled():
            found = compute_logprobs(self.model, self.ddp, free, self.cfg.temperature)
        for microbatch in microbatches:
            for item in microbatch:
                item.sample.ref_logprobs = found.get(item.number)

    def _add_gradients(self, deal: Deal, microbatches: list[list[TrainSample]]) -> None:
        """One forward and backward pass over the microbatches of this replica."""
        terms = LossTerms(
            self.cfg.kl_penalty,
            self.kl.value,
            self.entropy.applied,
            self.cfg.kl_in,
            self.cfg.correction,
            self._stale,
        )
        advantages = self._advantages_of(deal)

        def loss(
            packed: Microbatch, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, Sums]:
            batch = self._loss_batch(advantages, packed, logprobs, entropy)
            return microbatch_loss(batch, self.cfg.objective, terms)

        with self._counting_agreement():
            last_step = logprob_step(self.model, self.cfg.temperature, loss)
            self._update.sums += run_pipeline(
                self.model, self.ddp, microbatches, last_step, backward=True
            )

    def _counting_agreement(self) -> contextlib.AbstractContextManager:
        """Compare routers with the engine's while the weights are those of the start of the batch;
        later ones are compared where their old log-probs are computed."""
        if self._moved:
            return contextlib.nullcontext()
        return self.model.router_agreement.counting(with_gradients=True)

    def _take_step(self) -> UpdateStats:
        """Add the gradients of all replicas up, and take one optimizer step."""
        update = self._update
        self._moved = True
        with self.model.active():
            if self._accumulates:
                self.ddp.scale_gradients(1 / update.denominator)
            finalize_model_grads([self.ddp], None, pg_collection=self.model.groups)
            # before the update, so that a warm-up never wastes its first one
            self.scheduler.step(increment=1)
            _, grad_norm, _ = self.optimizer.step()
        return self._reduce(update, float(grad_norm))

    @property
    def _accumulates(self) -> bool:
        assert self._batch is not None
        return self._batch.accumulates

    @property
    def _has_reference(self) -> bool:
        assert self._batch is not None
        return self._batch.reference_version is not None

    @property
    def _stale(self) -> bool:
        """Other weights drew the tokens than learn first, and the ratio does not go back to them."""
        assert self._batch is not None
        return self._batch.staleness > 0 and self.cfg.old_logprobs == "recompute"

    def _weigh(self, deal: Deal) -> None:
        """Note the weights of a deal's samples in the loss.

        Where gradients are accumulated the denominator still grows: they are divided at the end.
        """
        assert self._batch is not None
        if not len(deal.numbers):  # it only ends an update
            return
        groups = deal.numbers // self._batch.samples_per_prompt
        samples = UpdateSamples(deal.counted, groups, self.cfg.response_budget)
        weights, denominator = sample_weights(self.cfg.objective.aggregation, samples)
        self._update.denominator += denominator
        if not self._accumulates:
            weights = weights / (denominator or 1.0)  # 0: no token counts
        self._update.weights |= zip(deal.numbers.tolist(), weights.tolist(), strict=True)

    def _group_table(self, groups: SampleTable) -> GroupTable:
        """What the advantages of these groups depend on."""
        return GroupTable(
            rewards=groups.rewards,
            counted=groups.counted,
            right=groups.right,
            scores=groups.scores,
            score_weights=np.array(self.cfg.score_weights),
        )

    def _whiten(self, deal: Deal) -> None:
        """Whiten the advantages of a deal, which is a whole update then, if asked for."""
        if self.cfg.whitens is None:
            return
        flat = self.advantages.reshape(-1)
        flat[deal.numbers] = whiten(flat[deal.numbers], deal.counted, self.cfg.whitens)

    def _advantages_of(self, deal: Deal) -> dict[int, float]:
        """The advantages of all samples of a deal, by number."""
        values = self.advantages.reshape(-1)[deal.numbers]
        assert np.isfinite(values).all(), f"advantages of a minibatch: {values}"
        return dict(zip(deal.numbers.tolist(), values.tolist(), strict=True))

    def _loss_batch(
        self,
        advantages: Mapping[int, float],
        packed: Microbatch,
        logprobs: torch.Tensor,
        entropy: torch.Tensor,
    ) -> LossBatch:
        """Lay what the samples bring beside what the policy says of their tokens."""
        samples = [item.sample for item in packed.items]
        weights = self._update.weights
        ref_logprobs = None
        if self._has_reference:
            found = [sample.ref_logprobs for sample in samples]
            ref_logprobs = packed.concat([values for values in found if values is not None])
        rollout_logprobs = packed.concat([sample.logprobs for sample in samples])
        if self.cfg.old_logprobs == "rollout":
            old_logprobs = rollout_logprobs
            trainer_logprobs = logprobs.detach()
        else:
            old_logprobs = self._old(packed, logprobs)
            trainer_logprobs = old_logprobs
        mask = packed.concat([sample.mask for sample in samples])
        return LossBatch(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=old_logprobs,
            trainer_logprobs=trainer_logprobs,
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            advantages=packed.per_token([advantages[item.number] for item in packed.items]),
            mask=mask,
            cu_seqlens=torch.tensor(
                packed.response_cu_seqlens, dtype=torch.int32, device=logprobs.device
            ),
            weights=mask * packed.per_token([weights[item.number] for item in packed.items]),
        )

    def _old(self, packed: Microbatch, logprobs: torch.Tensor) -> torch.Tensor:
        """Log-probs under the weights at the start of the batch: [R], no gradient."""
        numbers = [item.number for item in packed.items]
        if all(number in self._old_logprobs for number in numbers):
            return packed.concat([self._old_logprobs[number] for number in numbers])
        # The first update on these samples: the weights are still those of the start.
        old = logprobs.detach()
        self._old_logprobs |= zip(numbers, packed.split(old), strict=True)
        return old

    def _reduce(self, update: Update, grad_norm: float) -> UpdateStats:
        """Add up the sums of all replicas; only output ranks count, so TP and PP do not count
        twice."""
        assert self.grid.role_control is not None
        if self.grid.is_output_rank and update.sums:
            sums = Sums.join(update.sums)
        else:
            sums = Sums.zeros(self.stats)
        all_sum(sums.added, self.grid.role_control)
        all_max(sums.largest, self.grid.role_control)
        tallies = sums.tallies(self.stats)
        for key in self._not_measured(update):
            del tallies[key]
        tallies |= self._router_agreement()
        lr = self.optimizer.param_groups[0]["lr"]
        return UpdateStats(tallies, sums.tokens, grad_norm, lr)

    def _router_agreement(self) -> dict[str, Tally]:
        """How often routers of all ranks would have chosen what they replay; nothing if none did."""
        if self.model.shape.experts is None:
            return {}
        assert self.grid.role_control is not None
        sums = self.model.router_agreement.take().cpu()
        all_sum(sums, self.grid.role_control)
        same, compared = sums.tolist()
        if not compared:
            return {}
        key = ROUTER_AGREEMENT.key
        return {key: Tally(ROUTER_AGREEMENT.reduce, same, compared)}

    def _not_measured(self, update: Update) -> set[str]:
        """Statistics whose values say nothing in this update."""
        keys = set()
        if not update.is_first:
            keys |= {stat.key for stat in self.stats if stat.first_update}
        if self.cfg.old_logprobs == "rollout":
            keys.add(FIRST_DRIFT.key)  # the ratio has the mismatch in it
            if not update.is_first:  # weights have moved since the tokens were drawn
                keys |= {stat.key for stat in OF_MISMATCH}
        correction = self.cfg.correction
        if correction.weights_for(self._stale) == correction.reject == "none":
            keys |= {stat.key for stat in OF_CORRECTION}
        if self.kl.target is None:
            keys.add(KL_COEFFICIENT.key)
        if self.entropy.target is None:
            keys.add(ENTROPY_COEFFICIENT.key)
        if not self._has_reference:
            keys.add(KL.key)
        return keys

    @contextlib.contextmanager
    def _behaviour_weights(self) -> Iterator[None]:
        """Put back, for a moment, the weights at the start of this batch. Takes one tensor more.

        Later minibatches arrive after the first updates; their old log-probs are still those of the
        weights at the start, which drew them. To wait for all samples first would stop the pipeline.
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
        for kept, parameter in zip(self._behaviour, self._learning(), strict=True):
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

        if chosen.offload:
            for part in self.optimizer.chained_optimizers:
                if not part.is_stub_optimizer:
                    OffloadedState(part, model.device)
        # Several pipelines may add to one update, so its end is not that of a pipeline; and the loss
        # is divided by a count already, so Megatron's own division is left out.
        model.config.finalize_model_grads_func = None
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
    if control.type == "adaptive" and control.kl_coef > 0:  # 0 stays 0
        return KLCoefficient(control.kl_coef, control.target_kl, control.horizon)
    return KLCoefficient(control.kl_coef)


def _entropy_coefficient(start: float, control: EntropyCtrl) -> EntropyCoefficient:
    if control.type == "adaptive":
        return EntropyCoefficient(start, control.target, control.step, control.max)
    return EntropyCoefficient(start)
