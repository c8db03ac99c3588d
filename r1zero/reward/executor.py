"""The reward executor: scores responses beside the engine, in processes of their own.

    submit --> [functions of a sample] --> group complete --> [functions of a group] --> collect

Nothing here blocks but `collect`. `submit` and `poll` move bytes both ways and return, so the
engine calls `poll` between decode steps and the workers score while it decodes. Which worker scores
a response, and when, does not change its scores.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from r1zero.reward.choose import choose
from r1zero.reward.config import RewardConfig
from r1zero.reward.loaded import shown_name
from r1zero.reward.pool import START_SECONDS, Pool, WorkItem
from r1zero.reward.types import RewardInput
from r1zero.scores import Outcome, Score

# groups of a stream scored at once, so that one that takes its deadline does not stop all
IN_FLIGHT = 512


@dataclass(slots=True)
class _PendingGroup:
    """The responses to a prompt, by member, and their scores by reward function."""

    source: str  # which data set they are from
    cases: list[RewardInput | None]
    scores: list[dict[str, Score]]
    open: int  # responses whose functions of a sample are still to come
    done: bool = False


class RewardExecutor:
    """Scores groups of responses.

    Use as a context manager, or call `close`. Raises BadInput for reward functions that cannot be,
    and RuntimeError from `poll`, `submit` or `collect` when workers cannot start or fail their
    self-test.
    """

    def __init__(self, config: RewardConfig, start_seconds: float = START_SECONDS) -> None:
        chosen = choose(config.functions, config.settings)
        self.functions = list(chosen)  # by the names that scores have
        self._config = config
        self._weights: dict[str, dict[str, float]] = {}  # by data set, as far as they came
        declared = {name: each.declared for name, each in chosen.items()}
        # those that say whether a response is right, in order
        self.verdict_functions = [name for name in declared if declared[name].gives_verdict]
        self._of_group = [name for name in declared if declared[name].after_verdicts]
        self._of_sample = [name for name in declared if not declared[name].after_verdicts]
        self._groups: dict[Hashable, _PendingGroup] = {}
        failed = {name: float(each.failed) for name, each in declared.items()}
        self.pool = Pool(config, failed, start_seconds)

    def submit(self, group: Hashable, member: int, size: int, case: RewardInput) -> None:
        """Queue the response of one of the `size` members of a group; return at once."""
        entry = self._groups.setdefault(
            group, _PendingGroup(case.source, [None] * size, [{} for _ in range(size)], size)
        )
        assert entry.cases[member] is None, f"member {member} of {group} is being scored already"
        entry.cases[member] = case
        of_sample = self._applied(self._of_sample, case.source)
        if of_sample:
            self.pool.put(WorkItem(group, [member], [case], deque(of_sample)))
        else:
            self._close_member(group, entry)
        self.poll()

    def collect(self, groups: Iterable[Hashable]) -> dict[Hashable, list[dict[str, Score]]]:
        """Wait until these groups are scored; return and forget the scores of each member by
        function."""
        wanted = list(groups)
        for group in wanted:
            assert None not in self._groups[group].cases, f"a member of {group} was never submitted"
        while not all(self._groups[group].done for group in wanted):
            self.poll(wait_seconds=0.5)
        found = {group: self._groups.pop(group).scores for group in wanted}
        return {
            group: [self._in_order(member) for member in members]
            for group, members in found.items()
        }

    def stream(self, groups: Iterable[Sequence[RewardInput]]) -> Iterator[list[dict[str, Score]]]:
        """Score groups as they come, many at a time; yield the scores of their members in the same
        order."""
        waiting: deque[int] = deque()
        for number, cases in enumerate(groups):
            for member, case in enumerate(cases):
                self.submit(number, member, len(cases), case)
            waiting.append(number)
            while len(waiting) >= IN_FLIGHT or (waiting and self.is_done(waiting[0])):
                yield from self.collect([waiting.popleft()]).values()
        while waiting:
            yield from self.collect([waiting.popleft()]).values()

    def reward(self, scores: Mapping[str, Score], source: str = "") -> float:
        """Return the weighted sum of the scores of a response to a problem from there: of the
        reward functions of its data set, and no others."""
        weights = self._weights_of(source)
        return sum(weight * scores[name].value for name, weight in weights.items())

    def values(self, scores: Mapping[str, Score]) -> np.ndarray:
        """Return the scores of a response in the order of the run's own functions, float64 [K].

        0 for a function that was named since it was scored.
        """
        found = [scores[name].value if name in scores else 0.0 for name in self._weights_of("")]
        return np.array(found, np.float64)

    def is_done(self, group: Hashable) -> bool:
        """Tell whether `collect` would not wait for this group."""
        return self._groups[group].done

    def poll(self, wait_seconds: float = 0.0) -> None:
        """Take finished scores, hand out work, replace dead workers; wait for news if asked to."""
        for item in self.pool.poll(wait_seconds):
            entry = self._groups[item.group]
            for name, scores in item.scores.items():
                for member, score in zip(item.members, scores, strict=True):
                    entry.scores[member][name] = score
            if entry.open:
                self._close_member(item.group, entry)
            else:
                entry.done = True

    def _close_member(self, group: Hashable, entry: _PendingGroup) -> None:
        """Count a response as scored by itself; after the last one the whole group is scored."""
        entry.open -= 1
        if entry.open:
            return
        of_group = self._applied(self._of_group, entry.source)
        if not of_group:
            entry.done = True
            return
        cases = []
        for case, scores in zip(entry.cases, entry.scores, strict=True):
            assert case is not None, "all are here, since all are scored by themselves"
            cases.append(replace(case, right=self.verdict(scores)))
        self.pool.put(WorkItem(group, range(len(cases)), cases, deque(of_group)))

    def _in_order(self, scores: Mapping[str, Score]) -> dict[str, Score]:
        return {name: scores[name] for name in self.functions if name in scores}

    def _weights_of(self, source: str) -> dict[str, float]:
        """The reward functions of a data set by the names that scores have, with weights."""
        if source not in self._weights:
            weights = self._config.weights_of(source)
            self._weights[source] = {shown_name(name): each for name, each in weights.items()}
        return self._weights[source]

    def _applied(self, functions: Sequence[str], source: str) -> list[str]:
        """Those of the reward functions that score responses to problems from there."""
        weights = self._weights_of(source)
        return [name for name in functions if name in weights]

    def verdict(self, scores: Mapping[str, Score]) -> bool | None:
        """Whether a response is right, by the first function that says so; None if none does."""
        applied = [name for name in self.verdict_functions if name in scores]
        if not applied:
            return None
        return scores[applied[0]].outcome is Outcome.RIGHT

    def close(self) -> None:
        """End all workers; unfinished groups are lost."""
        self.pool.close()

    def __enter__(self) -> RewardExecutor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
