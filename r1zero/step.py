"""One GRPO training step, the page: every rank runs every line of it.

    rank 0 draws -> [rollout] samples, scores -> [ref] log-probs -> [train] learns, publishes -+
                         ^                                                                    |
                         +--------------------------------------------------------------------+

A line that names a role's object does its work on that role's ranks. Elsewhere the object is an idle
one, which does nothing and has no groups. A move is an asynchronous send for the giver and a
blocking receive for the taker. So the pipeline needs no threads and no scheduler: rollout ranks
decode minibatch m + 1 while ref ranks compute log-probs of m and train ranks learn from m - 1. What
each role waits for, and who ends the wait:

    rollout  the weights of the last step         train, by publishing
    ref      the groups of minibatch m            rollout, by handing over
    train    the same with reference log-probs    ref, by handing over

Simpler than DeepSeek-R1-Zero (arXiv:2501.12948): one loss for all tokens of a minibatch, a
reference that is never replaced. No branch is taken on a value that not all ranks hold.
"""

from __future__ import annotations

from r1zero.observe.metrics import step_metrics
from r1zero.observe.sample_summary import join_summaries
from r1zero.observe.samples import advantage_table
from r1zero.runtime import Runtime
from r1zero.types import StepOutcome


def train_step(step: int, runtime: Runtime) -> StepOutcome | None:
    """Run step 1, 2, ...; returns its outcome on the controller, None elsewhere."""
    world = runtime.world
    move = runtime.move
    clock = runtime.clock
    rollout = world.rollout
    ref = world.ref
    train = world.train

    # Draw. The plan is the same object on every rank: who generates what, and in which minibatch.
    with clock.span("draw"):
        batch = move.share_batch(move.at_controller(runtime.draw, step))
        mine = rollout.share(len(batch.prompts))
        runtime.engine.submit(batch, mine, runtime.sampling)
        runtime.policy.begin(batch)

    # Sample, score, reference, learn: minibatch by minibatch, each role as far as its input has
    # come.
    updates = []
    for m in range(batch.num_minibatches):
        arrivals = batch.arrivals(m)
        with clock.span("rollout"):
            groups = runtime.engine.collect(m)
        with clock.span("reward"):
            groups = runtime.reward_manager.score(groups)
            groups = runtime.selector.select(groups)
            runtime.sample_log.add(batch, groups)
        with clock.span("wait"):
            groups = move.send_with_scores(groups, arrivals, rollout, ref)
        with clock.span("ref"):
            groups = runtime.reference.add_logprobs(groups)
        with clock.span("wait"):
            groups = move.broadcast_groups(groups, arrivals, ref, train)
        with clock.span("update"):
            updates.append(runtime.policy.update(batch, m, groups))

    # Learn again from the same samples, if asked to.
    for epoch in range(1, batch.epochs):
        for m in range(batch.num_minibatches):
            with clock.span("update"):
                updates.append(runtime.policy.update(batch, m, [], epoch))

    # Rows of the samples file, as far as they are known, while others still learn.
    with clock.span("samples"):
        runtime.sample_log.prepare(batch)

    # Publish. All wait on the control plane first, and then enter the device collectives together.
    with clock.span("wait"):
        move.flush()
    with clock.span("publish"):
        runtime.publish()
        fault = runtime.prove_publish()

    # Report. Rollout replicas hold the samples: they write them and tell the controller of them.
    groups = runtime.policy.finish(updates, batch)
    advantages = move.from_controller(advantage_table, batch, groups)
    with clock.span("samples"):
        runtime.sample_log.write(batch, advantages, runtime.folder)
    records = move.to_controller(runtime.record(batch, fault))
    if not world.is_controller:
        return None
    runtime.remember_lengths(groups)
    samples = join_summaries([record.samples for record in records if record.samples])
    metrics = step_metrics(batch, samples, updates, records, world.placement)
    broken = runtime.invariants.broken(batch, samples, updates, records)
    return StepOutcome(metrics, broken, samples, records)
