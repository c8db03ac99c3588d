"""Accuracy of the current weights on problems that training does not see."""

from __future__ import annotations

from r1zero.batch import Batch
from r1zero.crew import Crew
from r1zero.observe.metrics import sample_metrics
from r1zero.world.moves import on

# Added to the step in the key of the sampler, so that evaluation draws other numbers than training.
EVALUATION = 2**32


def evaluate(crew: Crew, step: int) -> dict[str, float] | None:
    """Answer all evaluation problems with the weights of `step`; metrics on the controller, None elsewhere."""
    world, move = crew.world, crew.move
    batch = move.from_controller(_plan, crew, step)
    on(world.rollout, crew.engine.submit, batch)
    groups = on(world.rollout, crew.engine.collect, 0)
    groups = on(world.rollout, crew.scorer.score, groups)
    groups = move.hand_to_all(groups, batch.arrivals(0), world.rollout, world.train)
    move.settle()
    return move.at_controller(sample_metrics, groups)


def _plan(crew: Crew, step: int) -> Batch:
    prompts, size = crew.eval_prompts.prompts, crew.cfg.training.eval_samples_per_prompt
    return Batch(EVALUATION + step, step, prompts, size, len(prompts) * size)
