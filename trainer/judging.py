"""Judge a cycle's updates: check them, compare them with each other, and score them.

The checks come in this order, and the first that fails gives the refusal its name: what the coordinator knows of the
miner, what the task used, the update's form, copies, the miner's own shard, and the loss.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from traincert.trainer.aggregation import Accepted
from traincert.trainer.determinism import deterministic
from traincert.trainer.engines.orders import Commit, Order
from traincert.trainer.errors import Reason
from traincert.trainer.examples import Dataset, Examples, read_examples
from traincert.trainer.resources import impossible
from traincert.trainer.scoring import Contribution, Losses, Refusal, Scorer, score
from traincert.trainer.segments import Layout, Segment
from traincert.trainer.standings import Standing, Standings
from traincert.trainer.state import State
from traincert.trainer.training import rows
from traincert.trainer.updates import Update, UpdateError, read_update
from traincert.trainer.weights import ENOUGH, Score, foreign, limit_norms

_MANY = 64  # updates that are compared at once
_SMALL = 1e-30  # less than any norm that is not 0
_TINY = 4e-4  # a copy's distance from 1 is a quarter of it, where it is not known how alike updates are
_GROUPS = 16  # batches of the examples of a shard


@dataclass(frozen=True)
class TaskResult:
    """A task and its outcome: a contribution or a refusal."""

    order: Order
    params: int
    """The number of parameters (scalars) of its segment."""
    commit: Commit | None
    """What the miner committed to. None: it did not commit."""
    contribution: Contribution | None
    refusal: Refusal | None
    """Exactly one of `contribution` and `refusal` is None."""
    norm: float | None = None
    """The L2 norm of the update's move; None: it was not read."""
    scale: float = 1.0
    """What the update was multiplied by, so that its norm is not above what is usual."""
    own_shard: float | None = None
    """The z-score of how much more it helps on its own shard than on others; None: it was not measured."""
    score: Score | None = None
    """None: it was not measured on the validation examples."""
    epsilon: float | None = None
    """What it costs the examples of its shard; None: it gave no update, or the job has no privacy."""


@dataclass(frozen=True)
class Known:
    """What updates are compared with, to find copies. `moves` and `step` are not known after a restart."""

    hashes: frozenset[bytes] = frozenset()
    """SHA-256 of the updates of earlier cycles."""
    moves: Mapping[tuple[bytes, int], tuple[bytes, torch.Tensor]] = field(default_factory=dict)
    """The shard and the move, bfloat16, of each miner's last update of each segment."""
    step: torch.Tensor | None = None
    """The last cycle's move of the model, (all trainable parameters,) float32."""


@dataclass(frozen=True)
class Judged:
    """What came of all tasks of a cycle."""

    tasks: tuple[TaskResult, ...]
    """Sorted by miner."""
    accepted: tuple[Accepted, ...]
    norms: Mapping[int, float]
    """The usual L2 norm of a move, by segment, for the next cycle."""
    standings: Standings
    """With this cycle's measurements."""
    known: Known
    """For the next cycle, without its step."""

    def without(self, miners: Collection[bytes]) -> Judged:
        """Refuse accepted updates whose miners did not send the memory with which their task is done again."""

        def judged(task: TaskResult) -> TaskResult:
            miner = task.order.task.miner
            if miner not in miners:
                return task
            detail = "the memory did not come, with which the task was to be done again"
            return replace(task, contribution=None, refusal=Refusal(miner, Reason.MEMORY_WITHHELD, detail))

        accepted = tuple(each for each in self.accepted if each.contribution.miner not in miners)
        return replace(self, tasks=tuple(map(judged, self.tasks)), accepted=accepted)


@dataclass
class _Case:
    """An update on its way through the checks. `refused` is the first check that failed."""

    order: Order
    commit: Commit | None
    segment: Segment
    update: Update | None = None
    refused: UpdateError | None = None
    norm: float | None = None
    scale: float = 1.0
    own_shard: float | None = None
    score: Score | None = None

    @property
    def miner(self) -> bytes:
        return self.order.task.miner

    @property
    def hash(self) -> bytes:
        """SHA-256 of the update."""
        return self.commit.update_hash if self.commit else b""

    @property
    def moved(self) -> Update:
        """The update at the size at which it is scored."""
        assert self.update  # noqa: S101 - it is not refused
        return self.update.scaled(self.scale) if self.scale < 1 else self.update

    def refuse(self, reason: Reason, detail: str) -> None:
        self.refused = UpdateError(reason, detail)


@dataclass
class Judge:
    """Judges a job's updates."""

    dataset: Dataset
    layout: Layout
    segments: Sequence[Segment]
    scorer: Scorer
    validation: Examples
    task_flops: Sequence[int]
    """How many floating-point operations a task of each segment needs at least."""
    _shards: dict[bytes, Examples] = field(default_factory=dict)

    @deterministic()
    def judge(
        self,
        model: State,
        orders: Sequence[Order],
        commits: Sequence[Commit | Reason],
        updates: Sequence[bytes | memoryview | Reason],
        *,
        score_seed: bytes,
        known: Known,
        norms: Mapping[int, float],
        standings: Standings,
        refused: Mapping[bytes, UpdateError],
        strangers: bool,
    ) -> Judged:
        """Judge the updates of `orders`, which start from `model`.

        `known`, `norms` and `standings` are the last cycle's. `refused` are miners that are refused whatever they sent.
        Without `strangers` miners are trusted: only an update's form is checked, and its whole loss reduction counts.
        """
        cases = []
        for order, commit, sent in zip(orders, commits, updates, strict=True):
            case = _Case(order, commit if isinstance(commit, Commit) else None, self.segments[order.task.segment])
            case.refused = refused.get(case.miner) if case.commit else None
            if strangers and not case.refused:
                self._check_resources(case)
            if not case.refused:
                self._read(case, sent, model)
            cases.append(case)
        if strangers:
            norms = self._limit_norms(cases, norms)
            self._find_copies(cases, known)
            known = _remembered(known, cases)
            if self.dataset.job.shard_examples and len(self.dataset.shards) > 1:
                standings = self._compare_shards(cases, model, score_seed, standings)
        self._score(cases, model, score_seed, self.dataset.job.noise_margin if strangers else 0.0)
        return Judged(
            tuple(map(_result, cases)),
            tuple(
                Accepted(contribution, case.segment, case.moved)
                for case in cases
                if (contribution := _result(case).contribution)
            ),
            norms,
            standings,
            known,
        )

    def _check_resources(self, case: _Case) -> None:
        used = case.commit.resources if case.commit else None
        if why := impossible(self.task_flops[case.order.task.segment], used):
            case.refuse(Reason.IMPOSSIBLE_RESOURCES, why)

    def _read(self, case: _Case, sent: bytes | memoryview | Reason, model: State) -> None:
        try:
            if isinstance(sent, Reason):
                raise UpdateError(sent, _WHY[sent])
            if case.commit and case.commit.memory_before not in (None, case.order.memory_hash):
                raise UpdateError(Reason.WRONG_MEMORY, "the task began with another memory than the last task left")
            case.update = read_update(sent, self.dataset.job, case.segment, model)
            case.norm = case.update.norm
        except UpdateError as error:
            case.refused = error

    def _limit_norms(self, cases: Sequence[_Case], norms: Mapping[int, float]) -> dict[int, float]:
        """Scale updates down to the usual norm: a miner gains nothing by a larger one. Return the usual norms."""
        valid = [case for case in cases if not case.refused]
        scales, usual = limit_norms(
            [case.order.task.segment for case in valid], [case.norm or 0.0 for case in valid], norms
        )
        for case, scale in zip(valid, scales, strict=True):
            case.scale = scale
        return usual

    def _find_copies(self, cases: Sequence[_Case], known: Known) -> None:
        """Refuse what is like an update that was committed to earlier, or the model's last move.

        Two tasks with the same segment and shard are nearly the same work: only equal bytes are a copy there. Where
        all updates are alike, as in a first cycle, a copy is much more alike.
        """
        for segment, here in _by_segment([case for case in cases if not case.refused]).items():
            here.sort(key=lambda case: (case.commit.place if case.commit else 0, case.miner))
            last = [(miner, *each) for (miner, where), each in known.moves.items() if where == segment]
            step = [] if known.step is None else [known.step[here[0].segment.start : here[0].segment.end]]
            moves = [case.update.move for case in here if case.update]
            cosines = _cosines(moves, [*moves, *(move for _, _, move in last), *step])
            names = [f"the update of {case.miner.hex()}, which was committed to first" for case in here]
            names += [f"the last update of {miner.hex()} of this segment" for miner, _, _ in last]
            names += ["the model's last move" for _ in step]
            shards = [*(case.order.shard_hash for case in here), *(shard for _, shard, _ in last), *(b"" for _ in step)]
            same_shard = np.array([[case.order.shard_hash == shard for shard in shards] for case in here])
            pairs = cosines[:, : len(here)][np.tril(~same_shard[:, : len(here)], -1)]
            usual = 1 - float(np.quantile(pairs, 0.25)) if len(pairs) >= ENOUGH else _TINY  # a quarter is less alike
            least = max(self.dataset.job.copy_cosine, 1 - usual / 4)
            cosines[same_shard] = -1.0
            cosines[:, : len(here)][np.triu_indices(len(here))] = -1.0  # only what was committed to earlier counts
            committed: dict[bytes, int] = {}
            for number, case in enumerate(here):
                like, cosine = int(cosines[number].argmax()), float(cosines[number].max())
                what = names[like]
                if case.hash in known.hashes:
                    what, cosine = "an update of an earlier cycle", 1.0
                elif case.hash in committed:
                    what, cosine = names[committed[case.hash]], 1.0
                committed.setdefault(case.hash, number)
                if cosine >= least:
                    case.refuse(Reason.COPY, f"cosine {cosine:.4f} with {what}; it must be below {least:.4f}")

    def _compare_shards(
        self, cases: Sequence[_Case], model: State, seed: bytes, standings: Standings
    ) -> dict[bytes, Standing]:
        """Measure how much more each update helps on its own shard; refuse where the evidence is much too small."""
        found = dict(standings)
        valid = [case for case in cases if not case.refused]
        for segment, here in _by_segment(valid).items():
            # Compared with the mean update, which helps on all shards, what is special of an update shows sooner.
            mean = torch.stack([case.moved.move for case in here]).mean(0)
            usual = Update(mean).applied(self.layout, self.segments[segment], model) if len(here) > 1 else model
            for case in here:
                after = case.moved.applied(self.layout, case.segment, model)
                own, other = (self.scorer.losses([usual, after], each, _GROUPS) for each in self._examples(case, seed))
                case.own_shard = _z_score(own, other)
                if case.own_shard is not None:
                    found[case.miner] = found.get(case.miner, Standing()).measured(case.own_shard)
        evidence = {case.miner: found[case.miner].own_shard or 0.0 for case in valid if case.own_shard is not None}
        for miner, median in foreign(evidence, self.dataset.job.shard_margin).items():
            detail = (
                f"evidence {evidence[miner]:.2f} that it trains on its own shard; the miners' median is {median:.2f}"
            )
            next(case for case in valid if case.miner == miner).refuse(Reason.NOT_ITS_SHARD, detail)
        return found

    def _examples(self, case: _Case, seed: bytes) -> tuple[Examples, Examples]:
        """Draw examples on which the task trained, and as many of another shard."""
        job, shards = self.dataset.job, self.dataset.shards
        draw = np.random.RandomState(_words(b"shard" + case.miner + seed))
        own = self._shard(case.order.shard_hash)
        used = torch.unique(torch.cat(list(rows(job, len(own), case.order.task))))
        number = case.order.task.shard
        other = self._shard(shards[(number + 1 + draw.randint(len(shards) - 1)) % len(shards)])
        count = min(job.shard_examples, len(used), len(other))
        mine = used[torch.from_numpy(draw.permutation(len(used))[:count])]
        return own.batch(mine), other.batch(torch.from_numpy(draw.permutation(len(other))[:count]))

    def _shard(self, digest: bytes) -> Examples:
        if digest not in self._shards:
            self._shards[digest] = read_examples(self.dataset.job, self.dataset.shard_folder, digest)
        return self._shards[digest]

    def _score(self, cases: Sequence[_Case], model: State, score_seed: bytes, noise_margin: float) -> None:
        """Score the updates that are left on validation examples."""
        left = [case for case in cases if not case.refused]
        # Score each of n updates at 1/n of its size. At full size, the noise of one miner's few examples can raise the
        # loss, although the mean of all, in which noise averages out, lowers it.
        share = 1 / max(1, len(left))
        candidates = (
            case.update.scaled(case.scale * share).applied(self.layout, case.segment, model)
            for case in left
            if case.update
        )
        examples = self._score_examples(score_seed)
        known = self.scorer.known_losses(model, examples)
        before, *losses = known + self.scorer.losses(candidates if known else chain([model], candidates), examples)
        for case, after in zip(left, losses, strict=True):
            late = bool(case.commit and case.commit.late)
            case.score = each = score(self.dataset.job, case.segment.params, before, after, noise_margin, late=late)
            if not each.weight:
                case.refuse(
                    Reason.NO_IMPROVEMENT,
                    f"the loss falls by {each.reduction} nano-nats; more than {each.margin} would count",
                )

    def _score_examples(self, seed: bytes) -> Examples:
        """Draw the validation examples that this cycle's updates are scored on."""
        count, wanted = len(self.validation), self.dataset.job.score_examples
        if not 0 < wanted < count:
            return self.validation
        draw = np.random.RandomState(_words(b"score" + seed))
        return self.validation.batch(torch.from_numpy(np.sort(draw.permutation(count)[:wanted])))


def _z_score(own: Sequence[Losses], other: Sequence[Losses]) -> float | None:
    """Return by how many standard errors the loss falls more on one's own shard, from the first state to the second."""
    (here, here_error), (there, there_error) = own[0].fall(own[1]), other[0].fall(other[1])
    error = math.hypot(here_error, there_error)
    z_score = (here - there) / error if error else math.nan
    return z_score if math.isfinite(z_score) else None


def _remembered(known: Known, cases: Sequence[_Case]) -> Known:
    """Return what is known after a cycle. A copy's move is left out: it is not of the shard that its task names."""
    moves = {
        (case.miner, case.order.task.segment): (case.order.shard_hash, case.update.move.bfloat16())
        for case in cases
        if case.update and not (case.refused and case.refused.reason is Reason.COPY)
    }
    return Known(known.hashes | {case.hash for case in cases if case.update}, {**known.moves, **moves})


def _cosines(ours: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
    """Return the cosines of moves of one segment, (ours, others)."""
    found = np.ones((len(ours), len(others)), np.float32)
    if len(ours) * len(others) <= _MANY:  # without a copy: the moves may be big
        for row, mine in enumerate(ours):
            for column, other in enumerate(others):
                if mine is not other:
                    move = other.float()
                    found[row, column] = torch.dot(mine, move) / (mine.norm() * move.norm()).clamp_min(_SMALL)
        return found
    for begin in range(0, len(others), _MANY):  # not all have to fit into memory twice
        moves = torch.nn.functional.normalize(torch.stack([move.float() for move in others[begin : begin + _MANY]]))
        for start in range(0, len(ours), _MANY):
            some = torch.nn.functional.normalize(torch.stack(list(ours[start : start + _MANY])))
            found[start : start + _MANY, begin : begin + _MANY] = (some @ moves.T).numpy()
    return found


def _by_segment(cases: Sequence[_Case]) -> dict[int, list[_Case]]:
    found: dict[int, list[_Case]] = defaultdict(list)
    for case in cases:
        found[case.order.task.segment].append(case)
    return found


def _words(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint32)


def _result(case: _Case) -> TaskResult:
    contribution = refusal = None
    if case.refused:
        refusal = Refusal(case.miner, case.refused.reason, case.refused.detail)
    else:
        assert case.score  # noqa: S101 - an accepted update has one
        assert case.commit  # noqa: S101 - and a commit
        contribution = Contribution(
            case.miner, case.commit.update_hash, case.segment.params, case.score.loss_reduction, case.score.weight
        )
    return TaskResult(
        case.order,
        case.segment.params,
        case.commit,
        contribution,
        refusal,
        case.norm,
        case.scale,
        case.own_shard,
        case.score,
    )


_WHY = {
    Reason.WORKER_DIED: "the task's worker process died twice",
    Reason.LATE: "the task was not done in time",
    Reason.ABSENT: "the miner left before it committed",
    Reason.WITHHELD: "the update that the miner committed to did not come",
}
