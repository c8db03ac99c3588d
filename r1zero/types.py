"""The data model of a step: prompts, samples, groups, the plan of a global batch, its records.

Axes: P prompts in a global batch, G samples of one prompt, S = P * G samples, M minibatches,
T response tokens. Sample s belongs to prompt s // G and is its member s % G; minibatch m holds the
samples [m * B, (m + 1) * B) with B = `ppo_mini_batch_size`.

Fields are filled in the order of the step: the controller fills Prompt, the rollout ranks tokens
and log-probs and the loss mask, the reward executor scores and reward, the ref ranks
`ref_logprobs`, the train ranks `advantage`. Until then a field is empty: None, or not a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any

import numpy as np

from r1zero.scores import Outcome, Score


class Reduce(Enum):
    """How the values that a statistic has for all response tokens become one number."""

    TOKEN_MEAN = "mean over tokens"
    SEQUENCE_MEAN = "mean over sequences"  # of the means over the tokens of each
    MAX = "largest"


@dataclass(frozen=True, slots=True)
class Tally:
    """A statistic of one update in a form that joins with those of other updates."""

    reduce: Reduce
    total: float  # the sum, or the largest value
    count: int  # of tokens or sequences, whichever the mean runs over


@dataclass(slots=True)
class UpdateStats:
    """What one update told, equal on all train ranks."""

    tallies: dict[str, Tally]  # by their keys in metrics.jsonl
    tokens: int  # response tokens that were learned from
    grad_norm: float
    lr: float


def joined(updates: Sequence[UpdateStats], key: str) -> float:
    """Reduce a statistic over the updates that measured it, of which there must be one."""
    tallies = [update.tallies[key] for update in updates if key in update.tallies]
    if tallies[0].reduce is Reduce.MAX:
        return max(tally.total for tally in tallies)
    return sum(tally.total for tally in tallies) / sum(tally.count for tally in tallies)


class Agreement(IntEnum):
    """What the verdicts on the responses of a group have in common."""

    MIXED = 0
    ALL_RIGHT = 1
    ALL_WRONG = 2
    ALIKE = 3  # and neither of these
    FAILED = 4  # a score of it failed, so it cannot be known


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, rendered through the template. `index` is its row in the data set."""

    index: int
    text: str
    tokens: np.ndarray  # int32 [prompt tokens]
    answer: str
    # The columns of the data that reward functions see; None where none sees any, and on ranks that
    # do not score.
    row: Mapping[str, Any] | None = None
    source: str = ""  # which data set it is from, if that has a name
    category: int | None = None  # what scores its responses (scores.py)
    # The question and the system text as the data have them, which a reward model may read in another
    # rendering than `text`; empty of what is preprocessed.
    question: str = ""
    system: str = ""


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """What a sample that travels as a stub tells of its arrays."""

    length: int  # response tokens
    counted: int  # those that the loss mask leaves


@dataclass(slots=True)
class Sample:
    """One response. `logprobs[t]` is the log-prob of `tokens[t]` under the policy that drew it,
    at the sampling temperature, before top-k and top-p cut the distribution."""

    tokens: np.ndarray  # int32 [T], ends with an end-of-text id unless truncated
    logprobs: np.ndarray  # float32 [T]
    truncated: bool
    version: int  # of the weights it was drawn with, as the engine that held them says
    scores: dict[str, Score] = field(default_factory=dict)  # by reward function
    reward: float = math.nan  # weighted sum of the scores
    right: bool = False  # by the first reward function that gives a verdict
    # float64 [K], values of all reward functions in their order; only where advantages need them
    score_values: np.ndarray | None = None
    ref_logprobs: np.ndarray | None = None  # float32 [T]
    advantage: float = math.nan
    # bool [T], tokens that the loss counts: those that the policy drew itself. Default: all of
    # them.
    loss_mask: np.ndarray | None = None
    # Of a model with experts: those that each token but the last one went to while it was drawn,
    # uint8 [T - 1, layers with experts, experts per token].
    routes: np.ndarray | None = None
    # False: seen by advantages and counted in denominators, but not learnt from.
    trains: bool = True
    stub: TokenCounts | None = None  # in place of its arrays, which stayed behind and are empty

    @property
    def length(self) -> int:
        """Response tokens."""
        if self.stub is not None:
            return self.stub.length
        return len(self.tokens)

    @property
    def counted(self) -> int:
        """Response tokens that the loss mask leaves."""
        if self.stub is not None:
            return self.stub.counted
        return int(self.mask.sum())

    @property
    def mask(self) -> np.ndarray:
        """The loss mask, bool [T]."""
        if self.loss_mask is None:
            return np.ones(len(self.tokens), dtype=bool)
        return self.loss_mask

    @property
    def failed(self) -> bool:
        return any(score.outcome.failed for score in self.scores.values())

    @property
    def failure(self) -> str:
        """Name the first reward function that failed and why; "" when none did."""
        failed = (
            f"{name}: {score.why}" for name, score in self.scores.items() if score.outcome.failed
        )
        return next(failed, "")


@dataclass(slots=True)
class RecordedRoutes:
    """Which experts tokens went to, as they travel: `Sample.routes` by the number of the sample, and
    `Group.prompt_routes` by the position of the prompt."""

    prompts: dict[int, np.ndarray] = field(default_factory=dict)
    samples: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, other: RecordedRoutes) -> None:
        """Take those of another."""
        self.prompts |= other.prompts
        self.samples |= other.samples


@dataclass(slots=True)
class Group:
    """A prompt of the global batch with its G samples; `position` is its place in the batch."""

    position: int
    prompt: Prompt
    samples: list[Sample]
    trains: bool = True  # False: its samples are not learnt from
    dropped: str = ""  # why not, in a word
    prompt_routes: np.ndarray | None = None  # as Sample.routes, of all tokens of the prompt

    @classmethod
    def begun(cls, position: int, prompt: Prompt, size: int) -> Group:
        """A group whose samples are still to be drawn: empty ones keep their places."""
        tokens = np.zeros(0, np.int32)
        logprobs = np.zeros(0, np.float32)
        return cls(position, prompt, [Sample(tokens, logprobs, False, -1)] * size)

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(len(sample.tokens) for sample in self.samples)

    @property
    def training(self) -> list[Sample]:
        """The samples that are learnt from; what does not train travels as stubs."""
        if not self.trains:
            return []
        return [sample for sample in self.samples if sample.trains]

    @property
    def rewards(self) -> list[float]:
        """Of the samples, in order. AssertionError while one is not scored."""
        found = [sample.reward for sample in self.samples]
        assert all(map(math.isfinite, found)), (
            f"rewards of the prompt at position {self.position}: {found}"
        )
        return found


@dataclass(frozen=True, slots=True)
class Part:
    """Groups that travel together from role to role: those at these positions of the batch whose
    longest response has a length in this range, in tokens.

    So what belongs to a part follows from the samples, and not from who finished when. Of positions
    0 to 3, whose longest responses have 5, 90, 7 and 12 tokens, the part of the lengths 0 to 9
    holds 0 and 2; it is complete as soon as the others have drawn their tenth token.
    """

    positions: range
    lengths: range


ANY_LENGTH = 2**31  # above the length of every response


@dataclass(frozen=True, slots=True)
class Batch:
    """The plan of one global batch, equal on all ranks and fixed before generation starts.

    Where groups that are dropped are replaced, it is drawn in rounds. The plan of a later round has
    the prompts of all rounds so far, and parts for its own positions.
    """

    step: int  # that learns from it
    version: int  # of the weights that must draw every sample
    prompts: list[Prompt]  # [P]
    samples_per_prompt: int  # G
    minibatch_size: int  # B, in samples
    epochs: int = 1  # times that each minibatch is learnt from
    accumulates: bool = False  # gradients of each part, for one update with all of them
    planned_parts: tuple[Part, ...] = ()  # none: one with everything
    staleness: int = 0  # updates between the weights that draw and those that learn first
    # of the weights that the reference holds: 0, what it was loaded with; None: no reference
    reference_version: int | None = 0
    # None: minibatch m has the groups at certain positions, whether they train or not. Else so many
    # groups train, the first ones by position of those that are kept, and minibatches are whole groups
    # of these: the pool.
    pool: int | None = None
    first: int = 0  # position of its first prompt: those before were drawn in earlier rounds
    round: int = 1  # of those that draw for the pool
    most_rounds: int = 1
    # Tokens at which responses stop, below the response budget; groups with one that has not ended
    # are put off (data/tail_batching.py).
    response_limit: int | None = None
    keeps_routes: bool = False  # engines tell the experts that each token went to
    # Of prompts that were put off in earlier steps: step and position of their first draw, [P].
    first_draws: tuple[tuple[int, int], ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples that updates are made for."""
        if self.pool is not None:
            return self.pool * self.samples_per_prompt
        return len(self.prompts) * self.samples_per_prompt

    @property
    def fresh(self) -> int:
        """Prompts that it takes from the stream, in its rounds so far."""
        return 0 if self.first_draws else len(self.prompts)

    def random_key(self, position: int) -> tuple[int, int]:
        """Step and position by which the samples of a prompt have their random numbers: those of its
        first draw. So what was put off because it was long is not drawn once more in the hope of
        something shorter."""
        if self.first_draws:
            return self.first_draws[position]
        return self.step, position

    @property
    def rounds_left(self) -> int:
        """Rounds that may still follow."""
        return self.most_rounds - self.round

    @property
    def positions(self) -> range:
        """Of the prompts of this round."""
        return range(self.first, len(self.prompts))

    @property
    def num_minibatches(self) -> int:
        return -(-self.num_samples // self.minibatch_size)

    @property
    def everything(self) -> Part:
        """All groups of this round as one part."""
        return Part(self.positions, range(ANY_LENGTH))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts in which the batch travels, in order; each group is in one of them."""
        return self.planned_parts or (self.everything,)

    def with_rows(self, rows: Mapping[int, Mapping[str, Any] | None]) -> Batch:
        """The same batch with these data rows, by position, and no others."""
        prompts = [
            replace(prompt, row=rows.get(position)) for position, prompt in enumerate(self.prompts)
        ]
        return replace(self, prompts=prompts)

    def arrivals(self, minibatch: int) -> range:
        """Positions of the prompts whose first sample lies in this minibatch.

        Advantages are those of whole groups: one that spans several minibatches counts to the first.
        """
        group = self.samples_per_prompt
        size = self.minibatch_size
        first = -(-minibatch * size // group)
        return range(first, -(-(minibatch + 1) * size // group))

    def samples_of(self, minibatch: int) -> range:
        """Numbers of the samples that this minibatch trains on."""
        return range(minibatch * self.minibatch_size, (minibatch + 1) * self.minibatch_size)


@dataclass(frozen=True, slots=True)
class Drawn:
    """What a step drew, in all its rounds."""

    prompts: int  # from the stream of prompts
    groups: int
    kept: int  # those of which something trains


# -- records of a step ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TimeSpan:
    """`name` ran from `start` to `end`, in seconds since the epoch."""

    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What one reward function said about some samples."""

    total: Fraction  # of the values that count
    counted: int  # values that do
    outcomes: Counter[Outcome]


@dataclass(frozen=True, slots=True)
class PairSums:
    """Sums over samples that two reward functions, x and y, gave a value: what their correlation is
    made of."""

    samples: int
    x: Fraction
    y: Fraction
    xx: Fraction  # of the products, as the next two
    yy: Fraction
    xy: Fraction


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """How the values of the reward model spread, and what they have in common with the rules'."""

    groups: int  # with two values or more
    deviations: Fraction  # sum of the standard deviations in these groups
    pairs: dict[str, PairSums]  # by reward function: the model is x, the function y
    length: PairSums  # the same with the length of the response, in tokens


@dataclass(frozen=True, slots=True)
class SourceSummary:
    """What the samples of one data set amount to."""

    samples: int
    reward: Fraction  # sum of the rewards
    judged: int  # samples that a reward function calls right or not
    right: int
    response_tokens: int


@dataclass(frozen=True, slots=True)
class SampleSummary:
    """What the samples of some groups amount to.

    Sums are exact: the summaries of all replicas join to that of all samples, however many
    replicas there were.
    """

    groups: int
    equal_groups: int  # all rewards of the group are equal, so it teaches nothing
    agreements: Counter[Agreement]  # of the groups
    dropped: Counter[str]  # groups that do not train, by the reason
    samples: int
    reward: Fraction  # sum of the rewards
    scores: dict[str, ScoreSummary]  # by reward function
    copied: int  # samples whose answer is a span of the question
    failed: int  # samples with a score that failed
    reasons: Counter[str]  # why; of each replica the most frequent ones
    prompt_tokens: int  # a prompt counts for each of its samples
    response_tokens: int
    longest: int  # response, in tokens
    truncated: int
    versions: Counter[int]  # samples by the weights that drew them
    training_tokens: int  # response tokens of the samples that are learnt from
    unmasked_tokens: int  # those of them that the loss masks leave
    unused_ids: int  # response tokens whose id stands for no token
    # by data set, of those that have names
    sources: dict[str, SourceSummary] = field(default_factory=dict)
    # of unmasked_tokens, those of kept groups that the pool had no place for
    surplus_tokens: int = 0
    # Response tokens that a reward model looked at, those put off among them.
    judged_tokens: int = 0
    # Groups that are put off, and their response tokens: they are in none of the other numbers.
    put_off: int = 0
    put_off_tokens: int = 0
    model: ModelSummary | None = None  # None: the reward model read none of these samples


@dataclass(frozen=True, slots=True)
class RankRecord:
    """What one rank tells the controller about a step."""

    began: float  # its first span, in seconds since the epoch
    ended: float  # its last
    seconds: dict[str, float]  # by the name of the spans
    published_bytes: int  # written into this rank's rollout weights, and into its reference
    peak_gigabytes: float
    # response tokens seen by a role, where its results appear
    tokens: dict[str, int] = field(default_factory=dict)
    publish_fault: str | None = None  # what a comparison of checksums found, equal on all ranks
    spans: list[TimeSpan] = field(default_factory=list)  # of the few ranks whose spans are kept
    samples: SampleSummary | None = None  # of a rollout replica, from its output rank
    unwritten: str | None = None  # why the rows of these samples could not be written


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What the controller keeps of a step."""

    metrics: dict[str, float]
    broken: list[str]  # invariants, a sentence each
    samples: SampleSummary  # of all replicas
    records: list[RankRecord]
