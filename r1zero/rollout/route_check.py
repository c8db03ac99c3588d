"""Routes of an engine of the user's are looked at where they come in: sizes, type, ids.

Wrong ones would be found late, on a train rank, or be learnt from: a sample without routes turns
its routers free, and an expert that stands there twice counts twice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r1zero.errors import BadInput
from r1zero.models.config import Experts
from r1zero.types import Group


def check_routes(engine: str, groups: Sequence[Group], experts: Experts) -> None:
    """BadInput for the first routes of these groups that cannot be replayed."""
    for group in groups:
        prompt = f"the prompt at position {group.position}"
        _check(engine, prompt, group.prompt_routes, len(group.prompt.tokens), experts)
        for member, sample in enumerate(group.samples):
            name = f"sample {member} of {prompt}"
            _check(engine, name, sample.routes, len(sample.tokens) - 1, experts)


def _check(engine: str, what: str, routes: object, tokens: int, experts: Experts) -> None:
    """Look at the routes of so many tokens."""
    wanted = (tokens, len(experts.layers), experts.top_k)
    found = _fault(routes, wanted, experts.count)
    if found:
        raise BadInput(
            f"actor_rollout.engine: {engine}: {what} has {found}, wanted uint8 {list(wanted)}, which is "
            "[tokens, layers with experts, experts per token], of a response less its last token, with "
            f"ids below {experts.count} that differ in each row; mend the engine, or set "
            "actor_rollout.routing_replay=false"
        )


def _fault(routes: object, wanted: tuple[int, int, int], experts: int) -> str:
    """What is wrong with some routes; "" if nothing is."""
    if routes is None:
        return "no routes"
    if not isinstance(routes, np.ndarray):
        return f"routes that are a {type(routes).__name__} and no NumPy array"
    if routes.dtype != np.uint8 or routes.shape != wanted:
        return f"routes of {routes.dtype} {list(routes.shape)}"
    if routes.size and routes.max() >= experts:
        return f"routes with the id {routes.max()}"
    if _repeats(routes):
        return "routes with an expert twice in a row"
    return ""


def _repeats(routes: np.ndarray) -> bool:
    """Whether a token has an expert of a layer twice.

    Columns are compared with one another, 30 ms for 8,000 tokens of 48 layers and 8 experts; sorting
    the rows takes three times as long.
    """
    columns = np.ascontiguousarray(routes.reshape(-1, routes.shape[-1]).T)
    return any((columns[place + 1 :] == columns[place]).any() for place in range(len(columns)))
