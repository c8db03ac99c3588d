"""One GRPO training step, the page: every rank runs every line of it.

    rank 0 draws -> [rollout] samples, scores -> [ref] log-probs -> [train] learns, publishes -+
                         ^                                                                    |
                         +--------------------------------------------------------------------+

A line that names a role's object does its work on that role's ranks. Elsewhere the object is an idle
one, which does nothing and has no groups. A move is an asynchronous send for the giver and a
blocking receive for the taker. So the pipeline needs no threads and no scheduler: rollout ranks
decode one part of the batch while ref ranks compute log-probs of the part before and train ranks
learn from what came earlier. What each role waits for, and who ends the wait:

    rollout  the weights of the last step       train, by publishing
    ref      the groups of the next part        rollout, by handing over
    train    the same with reference log-probs  ref, by handing over

Without a KL term there is no ref, and rollout hands over to train: `world.giver` is who does. The
reference is what it was loaded with, or takes the policy's weights every so many steps.

A reward model looks at what was drawn and tells rollout its values, while the next part is drawn
(reward_model/judge.py).

Of a model with experts, which of them a token went to travels straight from rollout to train, which
repeats it (routing replay).

Where groups that teach nothing are replaced, a batch is drawn in rounds: the same lines once more,
with a plan that goes on behind the last position. It is known which groups train by their positions.

A part holds groups of like length, so short ones are learnt from while long ones are still drawn.
What it holds follows from the samples alone, and never from who finished when.

No branch is taken on a value that not all ranks hold.
"""

from __future__ import annotations

from collections.abc import Iterator

from r1zero.observe.metrics import step_metrics
from r1zero.observe.sample_summary import join_summaries
from r1zero.policy.handover import Taker
from r1zero.rollout.stored import GroupSource, StoredGroups
from r1zero.runtime import Runtime
from r1zero.types import Batch, Group, Part, StepOutcome


def train_step(step: int, runtime: Runtime) -> StepOutcome | None:
    """Run step 1, 2, ...; returns its outcome on the controller, None elsewhere.

    With staleness the batch that is drawn is not this step's, but one of a later step: rollout and
    ref work ahead while train learns.
    """
    for ahead in runtime.batches_to_draw(step):
        generate(draw(ahead, runtime), runtime.engine, runtime)
    return learn(step, runtime)


def draw(step: int, runtime: Runtime) -> Batch:
    """Plan a batch. It is the same object on every rank: who generates what, in which part."""
    with runtime.clock.span("draw"):
        batch = runtime.move.share_batch(runtime.move.at_controller(runtime.draw, step))
        runtime.batches[step] = batch
        runtime.submit(batch)
        return batch


def rounds(batch: Batch, taker: Taker, runtime: Runtime) -> Iterator[Batch]:
    """The plans of a batch: its first, and one more while groups that were dropped are to be replaced.

    The controller trains, so it knows how many are kept. Whether another round follows stands in the
    plan that it shares, so messages follow from plans and not from what each rank has seen.
    """
    yield batch
    while batch.rounds_left:
        with runtime.clock.span("wait"):
            more = runtime.move.at_controller(runtime.draw_more, batch, taker.known)
            batch = runtime.move.share_batch(more)
        if not batch.positions:
            break
        runtime.submit(batch)
        generate(batch, runtime.engine, runtime)
        yield batch


def generate(batch: Batch, engine: GroupSource, runtime: Runtime) -> None:
    """Sample, score, select, reference: part by part, each role as far as its input has come."""
    world = runtime.world
    move = runtime.move
    clock = runtime.clock
    giver = runtime.giver(batch)
    route_giver = runtime.route_giver(batch)
    for part, drawn in runtime.judge.judged(batch, sample(batch, engine, runtime)):
        with clock.span("reward"):
            groups = runtime.selector.select(batch, drawn)
            runtime.sample_log.add(batch, groups)
        with clock.span("wait"):
            groups = move.send_to_replicas(
                batch, groups, part.positions, world.rollout, world.giver
            )
            route_giver.give(drawn)  # to train, past the reference
        with clock.span("ref"):
            groups = runtime.reference.add_logprobs(groups)
        with clock.span("wait"):
            giver.give(groups)
    runtime.count_tokens(batch, engine)

    # Rows of the samples file, as far as they are known, while others still learn.
    with clock.span("samples"):
        runtime.sample_log.prepare(batch)


def sample(
    batch: Batch, engine: GroupSource, runtime: Runtime
) -> Iterator[tuple[Part, list[Group]]]:
    """Sample, and score by rules, part by part."""
    for part in batch.parts:
        with runtime.clock.span("rollout"):
            groups = runtime.collect(batch, part, engine)
        with runtime.clock.span("reward"):
            groups = runtime.reward_manager.score(groups)
        yield part, groups


def take_up(runtime: Runtime) -> None:
    """Send what a checkpoint held, drawn and not yet learnt from, on its way once more."""
    for batch, groups in runtime.restored:
        runtime.batches[batch.step] = batch
        generate(batch, StoredGroups(groups), runtime)
    runtime.restored.clear()


def learn(step: int, runtime: Runtime) -> StepOutcome | None:
    """Learn from a batch as far as it has come, publish the weights, report."""
    world = runtime.world
    move = runtime.move
    clock = runtime.clock
    policy = runtime.policy
    first = runtime.batches.pop(step)
    taker = Taker(move, first, world.giver, world.train, world.rollout)
    policy.begin(first)
    updates = []
    for batch in rounds(first, taker, runtime):
        taker.go_on(batch)
        policy.go_on(batch)
        for _ in batch.parts:
            with clock.span("wait"):
                deliveries = taker.take()
            for delivery in deliveries:
                with clock.span("update"):
                    updates += policy.learn(delivery)
    for epoch in range(1, batch.epochs):
        with clock.span("update"):
            updates += policy.learn_again(epoch)

    # Publish. All wait on the control plane first, and then enter the device collectives together.
    with clock.span("wait"):
        move.flush(step)
    with clock.span("publish"):
        runtime.publish()
        runtime.reset_reference(step)
        fault = runtime.prove_publish()

    # Report. Rollout replicas hold the samples: they write them and tell the controller of them.
    policy.finish(updates, batch)
    advantages, runtime.drawn = move.from_controller(lambda: (policy.advantages, taker.drawn))
    with clock.span("samples"):
        runtime.sample_log.write(batch, advantages, runtime.folder)
    records = move.to_controller(runtime.record(batch, fault))
    if runtime.planner is None:
        return None  # the controller goes on
    runtime.planner.record(batch, taker.known)
    samples = join_summaries([record.samples for record in records if record.samples])
    metrics = step_metrics(batch, samples, updates, records, world.placement)
    broken = runtime.invariants.broken(batch, samples, updates, records)
    return StepOutcome(metrics, broken, samples, records)
