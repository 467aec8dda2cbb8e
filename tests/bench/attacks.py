"""What attackers earn: their share of the lottery, and the model's accuracy, for each attack and each way to score.

    attacks.py FOLDER [--job digits|fashion]... [--rule RULE]... [--attack ATTACK]... [--seeds 3]

Ten miners train for 40 cycles; some of them attack. Each run is one process on one processor. Its result is kept in
FOLDER/attacks.json, so an interrupted bench goes on. At the end it writes FOLDER/table.md and FOLDER/attacks.png, a
plot.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from traincert.trainer.cycle import Trainer
from traincert.trainer.engines.executor import Executor
from traincert.trainer.engines.orders import Commit, OnCommit, Order
from traincert.trainer.errors import Reason
from traincert.trainer.examples import Examples, read_examples
from traincert.trainer.job import TrainingJob
from traincert.trainer.judging import Judge, Known, _Case
from traincert.trainer.preprocessing import prepare_dataset
from traincert.trainer.resources import Resources
from traincert.trainer.segments import Segment
from traincert.trainer.standings import Standing, Standings, choose
from traincert.trainer.state import State, load_state
from traincert.trainer.training import train_task
from traincert.trainer.updates import Update, encode_update, read_update
from traincert.trainer.weights import Score

MINERS, CYCLES = 10, 40

JOBS = {
    "digits": TrainingJob(
        cycles=CYCLES,
        dataset="traincert.trainer.datasets:digits",
        normalize={"inputs": "center"},
        shuffle_seed=1,
        validation_examples=300,
        test_examples=360,
        shards=10,
        model="traincert.trainer.models:mlp",
        model_options={"inputs": 64, "hidden": [64], "classes": 10},
        segments=2,
        optimizer="SGD",
        optimizer_options={"momentum": 0.9},
        learning_rate=0.003,
        schedule="cosine",
        batch_size=16,
        local_steps=16,
        spot_checks=0.02,
    ),
    "fashion": TrainingJob(
        cycles=CYCLES,
        dataset="traincert.trainer.datasets:fashion_mnist",
        normalize={"inputs": "all"},
        validation_examples=1000,
        shards=10,
        model="traincert.trainer.models:cnn",
        model_options={"channels": [8, 16], "hidden": 32, "classes": 10, "size": 28},
        optimizer="SGD",
        optimizer_options={"momentum": 0.9},
        learning_rate=0.02,
        schedule="cosine",
        batch_size=32,
        local_steps=16,
        score_examples=500,
        spot_checks=0.02,
    ),
}


@dataclass
class Scene:
    """What an attacker can see and do in one cycle."""

    segments: Sequence[Segment]
    cycle: int
    orders: Sequence[Order]
    honest: Mapping[bytes, Update]
    """The updates of the honest miners of this cycle."""
    train: Callable[..., Update]
    """Train a task, with what is changed in it."""
    step: torch.Tensor | None
    """The model's last move."""
    proven: bool
    """Whether the attacker knows that its work has passed a spot check."""
    noise: torch.Generator
    memory: dict[tuple[object, int], Update]
    """What the attackers remember from cycle to cycle."""

    def like(self, move: torch.Tensor, share: float) -> torch.Tensor:
        """Return noise with a share of the norm of a move."""
        noise = torch.randn(len(move), generator=self.noise)
        scaled: torch.Tensor = noise * (move.norm() * share / noise.norm())
        return scaled

    def other(self, order: Order) -> Update | None:
        """Return an honest miner's update of the same segment."""
        same = [o for o in self.orders if o.task.segment == order.task.segment and o.task.miner in self.honest]
        return self.honest[same[0].task.miner] if same else None


Attack = Callable[[Scene, Order], Update | None]
"""Returns the update that an attacker commits to; None: it does not commit."""


def honest(scene: Scene, order: Order) -> Update:
    """Do the task."""
    return scene.train(order)


def scaled(factor: float) -> Attack:
    """An honest update times a factor."""
    return lambda scene, order: Update(scene.train(order).move * factor)


def lazy(scene: Scene, order: Order) -> Update:
    """Train nothing, and send noise."""
    size = scene.segments[order.task.segment].params
    return Update(torch.randn(size, generator=scene.noise) * 1e-3)


def mimic(scene: Scene, order: Order) -> Update:
    """Train nothing, and send the model's last move with so much noise that it is no copy (cosine 0.9)."""
    segment = scene.segments[order.task.segment]
    if scene.step is None:
        return lazy(scene, order)
    move = scene.step[segment.start : segment.end]
    return Update(move + scene.like(move, 0.48))


def copy(scene: Scene, order: Order) -> Update:
    """Send another's update, seen before the commit."""
    return scene.other(order) or lazy(scene, order)


def noisy_copy(scene: Scene, order: Order) -> Update:
    """Send another's update with so much noise that it is no copy (cosine 0.9)."""
    seen = scene.other(order)
    return Update(seen.move + scene.like(seen.move, 0.48)) if seen else lazy(scene, order)


def colluding(scene: Scene, order: Order) -> Update:
    """The first of the pair trains; the other one sends the same with noise, if it has the same segment."""
    key = (scene.cycle, order.task.segment)
    if key not in scene.memory:
        scene.memory[key] = scene.train(order)
        return scene.memory[key]
    seen = scene.memory[key]
    return Update(seen.move + scene.like(seen.move, 0.3))


def replay(scene: Scene, order: Order) -> Update:
    """Train once for each segment, and send the same update ever after."""
    key = (order.task.miner, order.task.segment)
    if key not in scene.memory:
        scene.memory[key] = scene.train(order)
    return scene.memory[key]


def half_lazy(scene: Scene, order: Order) -> Update:
    """Train a tenth of the steps."""
    return scene.train(order, steps=0.1)


def half_lazy_scaled(scene: Scene, order: Order) -> Update:
    """Train a tenth of the steps, and scale the update to the norm of a whole one."""
    update = scene.train(order, steps=0.1)
    seen = scene.other(order)
    return Update(update.move * (seen.move.norm() / update.move.norm())) if seen else update


def patient(scene: Scene, order: Order) -> Update:
    """Train until a spot check has passed; from then on as `half_lazy_scaled`."""
    return half_lazy_scaled(scene, order) if scene.proven else scene.train(order)


def sign_flipped(scene: Scene, order: Order) -> Update:
    """Send the opposite of an honest update."""
    return Update(-scene.train(order).move)


def flipped_scaled(scene: Scene, order: Order) -> Update:
    """Send the opposite of an honest update, ten times as large."""
    return Update(-10 * scene.train(order).move)


def noise(scene: Scene, order: Order) -> Update:
    """Send noise with the norm of an honest update."""
    return Update(scene.like(scene.train(order).move, 1.0))


def label_flipped(scene: Scene, order: Order) -> Update:
    """Train on wrong labels."""
    return scene.train(order, labels=lambda labels: (labels + 1) % 10)


def backdoor(scene: Scene, order: Order) -> Update:
    """Train on examples with a mark, half of them, that are all to be of class 0."""
    return scene.train(order, mark=True)


def known_validation(scene: Scene, order: Order) -> Update:
    """Train on the validation examples, which nobody should have."""
    return scene.train(order, examples="validation")


def all_shards(scene: Scene, order: Order) -> Update:
    """Train as many steps as it must, but on the data of all shards."""
    return scene.train(order, examples="all")


def withhold(scene: Scene, order: Order) -> Update | None:
    """Commit, and send nothing."""
    return Update(torch.zeros(scene.segments[order.task.segment].params))


def splitting(scene: Scene, order: Order) -> Update | None:
    """One miner with four names: it does the task of one of them; the others are absent."""
    first = min(o.task.miner for o in scene.orders if o.task.miner not in scene.honest)
    return scene.train(order) if order.task.miner == first else None


def split_lazy(scene: Scene, order: Order) -> Update:
    """One miner with four names: it does a quarter of each one's steps."""
    return scene.train(order, steps=0.25)


def swapped(scene: Scene, order: Order) -> Update:
    """Two miners do each other's tasks, if they have the same segment."""
    mine = sorted(
        (o for o in scene.orders if o.task.miner not in scene.honest), key=lambda o: (o.task.segment, o.task.miner)
    )
    same = [o for o in mine if o.task.segment == order.task.segment]
    return scene.train(same[(same.index(order) + 1) % len(same)])


def forged(scene: Scene, order: Order) -> Update:
    """Do all of the task, and state a hundredth of the CPU seconds that its operations need."""
    return scene.train(order)


def together(scene: Scene, order: Order) -> Update | None:
    """Three attackers: one poisons, one copies, one is lazy."""
    mine = sorted(o.task.miner for o in scene.orders if o.task.miner not in scene.honest)
    return (flipped_scaled, noisy_copy, half_lazy_scaled)[mine.index(order.task.miner) % 3](scene, order)


@dataclass(frozen=True)
class Case:
    """An attack: how many names the attackers have, how many of the ten miners they are, and what they may earn."""

    attack: Attack | None
    names: int = 2
    miners: int | None = None
    """None: one for each name."""
    bar: str = ""
    """zero: they may earn 0.02; one: what they would honestly; half: their share of the work, a tenth, and 0.02."""


CASES = {
    "honest": Case(None),
    "lazy": Case(lazy, bar="zero"),
    "mimic": Case(mimic, bar="zero"),
    "copy": Case(copy, bar="zero"),
    "copy x4": Case(copy, names=4, bar="zero"),
    "noisy copy": Case(noisy_copy, bar="zero"),
    "colluding pair": Case(colluding, bar=""),
    "replay": Case(replay, bar="zero"),
    "half-lazy": Case(half_lazy, bar="half"),
    "half-lazy scaled": Case(half_lazy_scaled, bar="half"),
    "patient": Case(patient),
    "sign-flipped": Case(sign_flipped, bar="zero"),
    "flipped x10": Case(flipped_scaled, bar="zero"),
    "noise": Case(noise, bar="zero"),
    "label-flipped": Case(label_flipped, bar="zero"),
    "backdoor": Case(backdoor, bar="zero"),
    "scaled x1.2": Case(scaled(1.2), bar="one"),
    "scaled x2": Case(scaled(2), bar="one"),
    "scaled x3": Case(scaled(3), bar="one"),
    "scaled x10": Case(scaled(10), bar="one"),
    "splitting x4": Case(splitting, names=4, miners=1, bar="one"),
    "split lazy x4": Case(split_lazy, names=4, miners=1),
    "pooling x4": Case(honest, names=1, miners=4, bar="one"),
    "relabelling": Case(honest, bar="one"),
    "swapped tasks": Case(swapped),
    "known validation": Case(known_validation),
    "all shards": Case(all_shards),
    "withholding": Case(withhold, bar="zero"),
    "forged resources": Case(forged, bar="zero"),
    "together": Case(together, names=3, bar=""),
}


class AttackedEngine:
    """Does the tasks in this process; attackers change their updates."""

    def __init__(self, job: TrainingJob, store: Path, attack: Attack | None, attackers: Sequence[bytes]) -> None:
        self.job, self.store = job, store
        store.mkdir(parents=True, exist_ok=True)
        self._executor = Executor(job, store)
        self._attack, self._attackers = attack, set(attackers)
        self._memory: dict[tuple[object, int], Update] = {}
        self._updates: dict[bytes, bytes] = {}
        self._honest: dict[bytes, bytes] = {}
        self.trainer: Trainer
        self.step: torch.Tensor | None = None
        self.standings: Standings = {}
        self.cycle = 0
        self._noise = torch.Generator().manual_seed(job.seed)

    def collect(
        self, shards: Path, orders: Sequence[Order], on_commit: OnCommit | None = None
    ) -> list[Commit | Reason]:
        """Do all tasks, the attackers' last: they know the others' updates."""
        del on_commit
        self._updates.clear()
        found: dict[bytes, Commit | Reason] = {}
        honest: dict[bytes, Update] = {}
        for order in orders:
            if order.task.miner not in self._attackers:
                answer = self._executor.execute(shards, order)
                self._updates[order.task.miner] = answer.update
                found[order.task.miner] = Commit.to(answer, hashlib.sha256(answer.update).digest())
                honest[order.task.miner] = self._read(order, answer.update)
        for order in orders:
            if order.task.miner not in self._attackers or self._attack is None:
                continue
            scene = Scene(
                self.trainer.segments,
                self.cycle,
                orders,
                honest,
                self._train,
                self.step,
                self.standings.get(order.task.miner, Standing()).proven,
                self._noise,
                self._memory,
            )
            update = self._attack(scene, order)
            if update is None:
                found[order.task.miner] = Reason.ABSENT
                continue
            data, _ = encode_update(update, 1)
            self._updates[order.task.miner] = data
            sample = next(each for each in found.values() if isinstance(each, Commit))
            found[order.task.miner] = sample._replace(
                update_hash=hashlib.sha256(data).digest(),
                memory_before=None,
                memory_after=None,
                resources=self._used(order, 0.01) if self._attack is forged else None,
            )
        return [self._placed(found[order.task.miner], order) for order in orders]

    def _used(self, order: Order, share: float) -> Resources:
        """Return what a task says that used so much of the CPU seconds that its operations need."""
        speed = 1e10
        seconds = share * self.trainer._judge.task_flops[order.task.segment] / speed
        return Resources(seconds, 0.0, 1, 1, None, None, None, None, peak_flops=speed)

    def _placed(self, commit: Commit | Reason, order: Order) -> Commit | Reason:
        late = order.task.miner in self._attackers  # attackers commit after they have seen the others' updates
        return commit._replace(place=100 * late) if isinstance(commit, Commit) else commit

    def reveal(self, orders: Sequence[Order], commits: Sequence[Commit | Reason]) -> list[bytes | Reason]:
        """Return the updates."""
        if self._attack is withhold:
            return [
                Reason.WITHHELD if order.task.miner in self._attackers else self._updates[order.task.miner]
                for order in orders
            ]
        return [
            self._updates[order.task.miner] if isinstance(commit, Commit) else commit
            for order, commit in zip(orders, commits, strict=True)
        ]

    def bring(self, wanted: Mapping[bytes, Sequence[bytes]]) -> None:
        """All memories are in the store."""

    def _read(self, order: Order, data: bytes) -> Update:
        segment = self.trainer.segments[order.task.segment]
        return read_update(data, self.job, segment, load_state(self.store, order.model_hash))

    def _train(
        self,
        order: Order,
        *,
        steps: float = 1.0,
        examples: str = "shard",
        labels: Callable[[torch.Tensor], torch.Tensor] | None = None,
        mark: bool = False,
    ) -> Update:
        dataset, segment = self.trainer.dataset, self.trainer.segments[order.task.segment]
        job = replace(self.job, local_steps=max(1, round(self.job.local_steps * steps)))
        if examples == "validation":
            data = self.trainer.validation
        else:
            chosen = dataset.shards if examples == "all" else [order.shard_hash]
            parts = [read_examples(job, dataset.shard_folder, digest) for digest in chosen]
            data = Examples(
                (torch.cat([each.inputs[0] for each in parts]),), torch.cat([each.target for each in parts])
            )
        if labels:
            data = Examples(data.inputs, labels(data.target))
        if mark:
            inputs, target = data.inputs[0].clone(), data.target.clone()
            inputs[::2].view(len(inputs[::2]), -1)[:, :4] = 3.0
            target[::2] = 0
            data = Examples((inputs,), target)
        state = load_state(self.store, order.model_hash)
        trained = train_task(job, state, segment, data, order.task, {})
        return read_update(trained.update, replace(self.job, max_update_norm=1e9), segment, state)


class FedAvg(Judge):
    """Loss reduction only: the weight is what an update takes off the loss, at its full size."""

    def _limit_norms(self, cases: Sequence[_Case], norms: Mapping[int, float]) -> dict[int, float]:
        del cases
        return dict(norms)

    def _find_copies(self, cases: Sequence[_Case], known: Known) -> None:
        pass

    def _compare_shards(
        self, cases: Sequence[_Case], model: State, seed: bytes, standings: Standings
    ) -> dict[bytes, Standing]:
        del cases, model, seed
        return dict(standings)

    def _score(self, cases: Sequence[_Case], model: State, score_seed: bytes, noise_margin: float) -> None:
        del noise_margin
        left = [case for case in cases if not case.refused and case.update]
        states = [case.update.applied(self.layout, case.segment, model) for case in left if case.update]
        before, *after = self.scorer.losses([model, *states], self._score_examples(score_seed))
        for case, losses in zip(left, after, strict=True):
            reduction = before.mean - losses.mean
            self._pay(case, reduction)

    @staticmethod
    def _pay(case: _Case, weight: float) -> None:
        found = max(0, round(weight * 1e9)) if weight == weight else 0
        case.score = Score(found, 0, 0, found, found)
        if not found:
            case.refuse(Reason.NO_IMPROVEMENT, "")


class Gauntlet(FedAvg):
    """After Gauntlet (arXiv 2505.21684): before and after on own and on random data, and a relative rating.

    A miner's weight is its rating, a moving average of the share of the others whose update takes less off the loss of
    random data, times the moving average of the sign of (own data - random data), squared.
    """

    def _score(self, cases: Sequence[_Case], model: State, score_seed: bytes, noise_margin: float) -> None:
        del noise_margin
        ratings: dict[bytes, list[float]] = self.__dict__.setdefault("ratings", {})
        left = [case for case in cases if not case.refused and case.update]
        falls = []
        for case in left:
            assert case.update
            after = case.update.applied(self.layout, case.segment, model)
            own, other = (
                [each.mean for each in self.scorer.losses([model, after], examples)]
                for examples in self._examples(case, score_seed)
            )
            falls.append((own[0] - own[1], other[0] - other[1]))
        for case, (on_own, random) in zip(left, falls, strict=True):
            beaten = sum(random > each for _, each in falls) / len(falls) if random > 0 else 0.0
            rating = ratings.setdefault(case.miner, [0.5, 0.0])
            rating[0] = 0.9 * rating[0] + 0.1 * beaten
            rating[1] = 0.9 * rating[1] + 0.1 * (1 if on_own > random else -1)
            self._pay(case, max(0.0, rating[0]) * max(0.0, rating[1]) ** 2)


RULE = "traincert"
RULES: dict[str, type[Judge]] = {"loss only": FedAvg, "rating": Gauntlet}
"""Other ways to score."""
ALL_RULES = (RULE, "no spot checks", *RULES)
AGGREGATIONS = ("trimmed_mean", "geometric_median")
"""A rule may have one of these behind it, as in "loss only, trimmed_mean"."""


def run(job_name: str, rule: str, attack: str, seed: int, cycles: int = CYCLES) -> dict[str, Any]:
    """Run an attack. Return the attackers' share of the weight, the accuracy, and what tasks and checks there were."""
    torch.set_num_threads(1)
    case = CASES[attack]
    rule, _, aggregation = rule.partition(", ")
    job = replace(JOBS[job_name], seed=seed, aggregation=aggregation or "mean")  # type: ignore[arg-type]
    if rule != RULE:
        job = replace(job, spot_checks=0.0)
    others, names = MINERS - (case.miners or case.names), case.names
    label = attack if attack == "relabelling" else ""
    ids = [hashlib.sha256(f"{seed} {number}".encode()).digest() for number in range(others)]
    attackers = [hashlib.sha256(f"{seed} {others + number}{label}".encode()).digest() for number in range(names)]
    ids += attackers
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare_dataset(job, Path(folder) / "data")
        engine = AttackedEngine(job, Path(folder) / "store", case.attack, attackers if case.attack else ())
        with Trainer(dataset, engine) as trainer:
            engine.trainer = trainer
            if rule in RULES:
                judge = trainer._judge
                trainer._judge = RULES[rule](
                    judge.dataset, judge.layout, judge.segments, judge.scorer, judge.validation, judge.task_flops
                )
            state = trainer.start()
            shares, refusals, checks, tasks = [], [], 0, 0
            for cycle in range(cycles):
                cycle_seed = hashlib.sha256(f"{seed} {cycle}".encode()).digest()
                engine.step, engine.standings, engine.cycle = state.known.step, state.standings, cycle
                chosen = choose(cycle_seed, cycle, ids, state.standings, job.most_tasks)
                score_seed = hashlib.sha256(b"score" + cycle_seed).digest()
                result = trainer.run_cycle(state, chosen, seed=cycle_seed, score_seed=partial(_constant, score_seed))
                state = result.after
                whole = sum(each.weight for each in result.contributions)
                if whole:
                    shares.append(sum(each.weight for each in result.contributions if each.miner in attackers) / whole)
                refusals += [(each.reason, each.miner in attackers) for each in result.refusals]
                checks += len(result.spot_checks)
                tasks += len(result.tasks)
            accuracy = trainer.test(state.model).metric
    counted = {
        f"{'attackers' if bad else 'honest'} {reason}": refusals.count((reason, bad))
        for reason, bad in sorted(set(refusals))
    }
    return {
        "share": statistics.mean(shares) if shares else 0.0,
        "cycles": len(shares),
        "accuracy": accuracy,
        "checks": checks / tasks,
        "refusals": counted,
    }


def _constant(seed: bytes, commits: Mapping[bytes, Commit]) -> bytes:
    del commits
    return seed


Key = tuple[str, str, str, int]
"""Job, rule, attack, seed."""


def run_all(keys: Sequence[Key], path: Path) -> dict[Key, dict[str, Any]]:
    """Run what is not in the file yet, on all processors, and keep each result there."""
    found: dict[Key, dict[str, Any]] = {}
    if path.exists():
        found = {tuple(key): each for key, each in json.loads(path.read_text())}
    todo = [key for key in keys if key not in found]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=4) as pool:
        for key, result in pool.imap_unordered(_run, todo):
            found[key] = result
            path.write_text(json.dumps([[list(key), each] for key, each in sorted(found.items())], indent=1) + "\n")
            click.echo(f"{' '.join(map(str, key))}: share {result['share']:.3f}, accuracy {result['accuracy']:.4f}")
    return found


def _run(key: Key) -> tuple[Key, dict[str, Any]]:
    return key, run(*key)


def fair(attack: str) -> float:
    """Return the share that the attackers would have if they were honest: a task for each, with one name for each."""
    case = CASES[attack]
    miners = case.miners or case.names
    tasks = min(miners, case.names)
    return tasks / (MINERS - miners + tasks)


def verdict(attack: str, share: float, honest: float, lost: float) -> list[str]:
    """Return the bars that an attack does not meet, of its share, and of the accuracy that is lost (points)."""
    bad = []
    match CASES[attack].bar:
        case "zero" if share > 0.02:
            bad.append("share above 0.02")
        case "one" if share > 1.05 * honest:
            bad.append("share above 1.05 of honest")
        case "half" if share > 0.1 * honest + 0.02:
            bad.append("share above its work + 0.02")
    if lost > (1.5 if attack == "together" else 1.0):
        bad.append("accuracy")
    return bad


def table(found: Mapping[Key, dict[str, Any]], job: str, attacks: Sequence[str], rules: Sequence[str]) -> str:
    """Return a job's table: the attackers' share by each rule and, in brackets, the lost points of accuracy."""
    lines = ["| attack | honest share | " + " | ".join(rules) + " | not met |", "|---|---|" + "---|" * (len(rules) + 1)]
    for attack in attacks:
        cells, bad = [], []
        for rule in rules:
            pairs = [
                (result, base)
                for (name, each_rule, each, seed), result in found.items()
                if (name, each_rule, each) == (job, rule, attack) and (base := found.get((job, rule, "honest", seed)))
            ]
            if not pairs:
                cells.append("")
                continue
            share = statistics.mean(result["share"] for result, _ in pairs)
            lost = 100 * statistics.mean(base["accuracy"] - result["accuracy"] for result, base in pairs)
            cells.append(f"{share:.3f} ({lost:+.1f})")
            if rule == RULE:
                bad = verdict(attack, share, fair(attack), lost)
        lines.append(f"| {attack} | {fair(attack):.2f} | {' | '.join(cells)} | {', '.join(bad)} |")
    return "\n".join(lines) + "\n"


def plot(found: Mapping[Key, dict[str, Any]], path: Path) -> None:
    """Plot the attackers' share, as a multiple of their honest share, for each attack and rule."""
    import matplotlib.pyplot as plt

    jobs = sorted({key[0] for key in found})
    figure, axes = plt.subplots(1, len(jobs), figsize=(6 * len(jobs), 8), sharey=True, squeeze=False)
    for axis, job in zip(axes[0], jobs, strict=True):
        attacks = [attack for attack in CASES if any(key[0] == job and key[2] == attack for key in found)][::-1]
        rules = [rule for rule in ALL_RULES if any(key[:2] == (job, rule) for key in found)]
        for number, rule in enumerate(rules):
            heights = [
                statistics.mean(
                    [each["share"] for key, each in found.items() if key[:3] == (job, rule, attack)] or [0.0]
                )
                / fair(attack)
                for attack in attacks
            ]
            places = [place - 0.2 * number for place in range(len(attacks))]
            axis.barh(places, heights, height=0.2, label=rule)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=job, xlabel="share of the lottery / honest share", yticks=range(len(attacks)))
        axis.set_yticklabels(attacks)
        axis.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--job", "jobs", multiple=True, type=click.Choice(list(JOBS)), default=list(JOBS))
@click.option(
    "--rule",
    "rules",
    multiple=True,
    type=click.Choice([*ALL_RULES, *(f"{rule}, {each}" for rule in ALL_RULES for each in AGGREGATIONS)]),
    default=ALL_RULES,
)
@click.option("--attack", "attacks", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option("--seeds", type=click.IntRange(1), default=3, help="For traincert; other rules get one. Default: 3.")
def main(folder: Path, jobs: Sequence[str], rules: Sequence[str], attacks: Sequence[str], seeds: int) -> None:
    """Run the bench."""
    folder.mkdir(parents=True, exist_ok=True)
    attacks = list(dict.fromkeys(["honest", *attacks]))
    keys = [
        (job, rule, attack, seed)
        for seed in range(seeds)
        for job in jobs
        for rule in rules
        for attack in attacks
        if seed == 0 or rule == RULE
    ]
    found = run_all(keys, folder / "attacks.json")
    parts = []
    for job in dict.fromkeys(key[0] for key in found):
        shown = [
            rule
            for rule in dict.fromkeys([*ALL_RULES, *sorted(key[1] for key in found)])
            if (job, rule) in {key[:2] for key in found}
        ]
        known = [attack for attack in CASES if any(key[0] == job and key[2] == attack for key in found)]
        parts.append(f"{job}:\n\n{table(found, job, known, shown)}")
    (folder / "table.md").write_text("\n".join(parts))
    plot(found, folder / "attacks.png")
    click.echo("\n".join(parts))


if __name__ == "__main__":
    main()
