"""Do searches find better plans, and does predicted noise say which plan is better?

Claims: (a) plans sorted by their predicted noise are sorted by what they do to the loss, Spearman's rank correlation
0.8 or more; (b) at equal bytes, ``milp`` trains no worse than greedy; (c) a search costs few training steps.

Method: a small ResNet-18 and a small character GPT (``searches/subjects.py``), each trained for some steps on real data
from several seeds (initial weights and order of the data), in fp32 and under each plan on the same batches. A plan's
gap is its mean loss over the last 20 steps less that of fp32 with the same seed; the mean over the seeds. A training
that diverges counts as one that has learned nothing.

(a) Plans are drawn: any tensor in any of four formats down to one significant bit, any copy that waits in 8, 4 or 2
bits, how many and how often by chance (``searches/plans.py``). Noise is measured by first order on four batches, of one
fp32 training with a seed of its own: at its start, and after a third, two thirds and all of its steps ("along": the
mean of the last three). "together": the true relative squared error of the gradient under the whole plan, after a
third. "other seeds": how well the gaps of one seed rank the means of the others, the most that a prediction can hope
for.

(b) Every strategy gets the same peak bytes, a quarter of the way from all low to all high. The recipe ``coarse`` has
one significant bit in its 8-bit formats, so that a loss shows which tensors were chosen. Those that know no budget
(``operator``) have the bytes that they have. ``gact`` computes in bf16 and gives the copies that wait 8, 4 or 2 bits
after GACT's rule. ``optuna`` is ``assign.tune``, on the held-out loss, with a seed of its own; it knows the recipes of
the package alone. Accuracy and held-out loss are of the trained weights in fp32.

"With copies", ``milp`` also chooses which saved copies wait in 8, 4 or 2 bits, as GACT's rule does.

(c) Seconds of each search over the median fp32 training step, in the same process. ``milp`` has its noise already; what
that takes is told apart. What ``gact`` takes is its rule alone.

    python benchmarks/bench_search.py --data DIR            # half an hour on one core
    python benchmarks/bench_search.py --data DIR --small    # a smoke test

A run that was killed goes on from its JSON: start the same command again; on another day, or after a commit, name the
file, --output.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).parents[1]))

from assign.memory.deltas import Timeline
from assign.memory.estimate import peak_bytes
from assign.noise.measure import measure_noise
from assign.noise.options import NoiseOptions
from assign.plan.keys import base_key, is_saved_key
from assign.plan.noise_table import NoiseTable
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import NATIVE, Recipe, initial, save
from assign.plan.space import Granularity, SearchSpace
from assign.strategies import METHODS, STRATEGIES
from assign.strategies.milp import Milp
from assign.training.trials import Settings
from assign.training.tuning import StudyOptions, tune
from benchmarks import facts
from benchmarks.searches import plans, training
from benchmarks.searches.subjects import MODELS, Subject

OWN_SEED = 100  # of noise and of search by training; no comparison has it
BATCHES = (4, 1)  # that noise is measured on; the second number if small
PREDICTORS = ("start", "third", "along")

Entries = dict[str, Entry]


def main() -> None:
    options = parse(sys.argv[1:])
    torch.set_num_threads(options.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = options.output or (None if options.small else facts.default_path("search", "cpu"))
    result = opened(path, options)
    for name in options.models:
        subject = Subject.make(name, options.data, options.steps, options.small)
        found = result["models"].setdefault(name, {"description": subject.task.name, "drawn": [], "searches": []})
        Bench(subject, options, found, lambda: path and facts.write(path, result)).run()
        print("\n".join(["", *report(found)]), flush=True)
    if path:
        print(f"\nwrote {path.name}")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of Fashion-MNIST and tinyshakespeare.txt")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--parts", nargs="+", choices="abc", default=[*"abc"], help="c comes with the searches of b")
    parser.add_argument("--plans", type=int, help="drawn for (a): 32, or 3 if --small")
    parser.add_argument("--seeds", type=int, help="3, or 2 if --small")
    parser.add_argument("--steps", type=int, help="of each training: 120, or 4 if --small")
    parser.add_argument("--trials", type=int, help="of optuna: 8, or 1 if --small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="tiny models; writes nothing without --output")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    usual = {"plans": (32, 3), "seeds": (3, 2), "steps": (120, 4), "trials": (8, 1)}
    for name, pair in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, pair[options.small])
    return options


def opened(path: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """What the file holds already, or an empty result.

    Raises:
        SystemExit: it is of other trainings.
    """
    asked = {name: getattr(options, name) for name in ("seeds", "steps", "small", "trials")}
    if path is None or not path.exists():
        return {"facts": facts.gather("cpu", options.threads), "options": asked, "models": {}}
    found: dict[str, Any] = json.loads(path.read_text())
    if found["options"] != asked:
        sys.exit(f"{path.name} was begun with {found['options']}, asked for is {asked}. Give another --output.")
    return found


class Bench:
    """All parts for one model; what is done already stands in ``found`` and is not done again."""

    def __init__(
        self, subject: Subject, options: argparse.Namespace, found: dict[str, Any], write: Callable[[], Any]
    ) -> None:
        self.subject, self.options, self.found, self.write = subject, options, found, write
        self.seeds = range(options.seeds)

    def run(self) -> None:
        if "fp32" not in self.found:
            self.found["fp32"] = training.train(self.subject, None, self.seeds)
            self.write()
        self.step_seconds = training.step_seconds(self.subject)
        self.noise = self.measure()
        if "a" in self.options.parts:
            self.draw()
        if {"b", "c"} & {*self.options.parts}:
            self.search()

    def plan(self, entries: Mapping[str, Entry]) -> Assignment:
        return Assignment(entries=dict(entries), recipe="native", fingerprint=self.subject.table.fingerprint)

    def measure(self) -> dict[str, NoiseTable]:
        """Noise at the start, after a third, and along the training: a function of the seed, so no file keeps it."""
        s, seconds = self.subject, []
        places = [0, s.steps // 3, 2 * s.steps // 3, s.steps]
        models = training.along(s, OWN_SEED, places)
        batches = s.batches(OWN_SEED + 1, BATCHES[self.options.small])
        tables = []
        for model in models:
            start = time.perf_counter()
            tables.append(
                measure_noise(
                    model,
                    batches,
                    s.task.loss,
                    space=SearchSpace(formats=plans.RUNGS, saved=plans.SAVED),
                    options=NoiseOptions(rtol=0, max_batches=len(batches)),
                )
            )
            seconds.append(time.perf_counter() - start)
        self.third, self.batches = models[1], batches
        self.found["noise"] = {
            "cells": len(tables[0].cells),
            "batches": len(batches),
            "seconds": seconds,
            "step_seconds": self.step_seconds,
        }
        whole = tables[1]
        for each in tables[2:]:
            whole = whole.add(each.cells)
        return {"start": tables[0], "third": tables[1], "along": whole}

    def draw(self) -> None:
        """Part (a)."""
        done = self.found["drawn"]
        for number in range(len(done), self.options.plans):
            entries = plans.draw(self.subject.table, self.subject.free, number)
            row = {
                "code": plans.to_code(self.subject.table, entries),
                "predicted": {name: table.of(entries) for name, table in self.noise.items()},
                "together": training.gradient_error(self.subject, self.third, self.plan(entries), self.batches),
                "runs": training.train(self.subject, self.plan(entries), self.seeds),
            }
            done.append(row)
            self.write()
            print(f"drawn {number}: {row['predicted']['along']:.3g}, {gaps(row, self.found['fp32'])}", flush=True)

    def search(self) -> None:
        """Parts (b) and (c)."""
        table = self.subject.table
        self.found["peaks"] = {recipe.name: self.peaks(recipe) for recipe in (plans.COARSE, NATIVE)}
        done = {(row["strategy"], row["recipe"]) for row in self.found["searches"]}
        for (strategy, recipe), find in self.strategies().items():
            if (strategy, recipe) in done:
                continue
            start = time.perf_counter()
            entries = find()
            seconds = time.perf_counter() - start
            code = plans.to_code(table, entries)
            known = next((row["runs"] for row in self.found["searches"] if row["code"] == code), None)
            row = {
                "strategy": strategy,
                "recipe": recipe,
                "code": code,
                "peak_bytes": peak_bytes(table, entries),
                "predicted": {name: each.of(entries) for name, each in self.noise.items()},
                "seconds": seconds,
                "step_seconds": self.step_seconds,
                "runs": known or training.train(self.subject, self.plan(entries), self.seeds),
            }
            self.found["searches"].append(row)
            self.write()
            print(f"{strategy}, {recipe}: {gaps(row, self.found['fp32'])}, {seconds:.2f} s", flush=True)

    def peaks(self, recipe: Recipe) -> dict[str, int]:
        """Peak bytes with everything high, with everything low, and a quarter of the way up from there."""
        table = self.subject.table
        everything = frozenset(group.id for group in table.groups)
        high, low = (peak_bytes(table, initial(table, recipe, groups)) for groups in (frozenset[int](), everything))
        return {"high": high, "low": low, "budget": low + (high - low) // 4}

    def strategies(self) -> dict[tuple[str, str], Callable[[], Entries]]:
        """What finds a plan, by strategy and recipe."""
        found: dict[tuple[str, str], Callable[[], Entries]] = {}
        for recipe in (plans.COARSE, NATIVE):
            budget = self.found["peaks"][recipe.name]["budget"]
            known = {
                "milp": partial(self.milp, recipe, budget),
                "milp by tensor": partial(self.milp, recipe, budget, granularity=Granularity.TENSOR),
                "milp with copies": partial(self.milp, recipe, budget, copies=True),
                "milp by tensor with copies": partial(
                    self.milp, recipe, budget, granularity=Granularity.TENSOR, copies=True
                ),
                "milp, noise at the start": partial(self.milp, recipe, budget, noise="start"),
                **{name: partial(self.simple, name, recipe, budget) for name in STRATEGIES},
                "operator": partial(METHODS["operator"].baseline, self.subject.table, recipe),
                "gact": partial(self.gact, budget),
            }
            if recipe is NATIVE:
                known |= {"optuna": partial(self.optuna, budget)}
            found |= {(name, recipe.name): find for name, find in known.items()}
        return found

    def simple(self, name: str, recipe: Recipe, budget: int) -> Entries:
        table = self.subject.table
        return STRATEGIES[name](table, recipe=recipe, peak_bytes=partial(peak_bytes, table), budget_bytes=budget)

    def milp(
        self,
        recipe: Recipe,
        budget: int,
        *,
        granularity: Granularity = Granularity.GROUP,
        noise: str = "along",
        copies: bool = False,
    ) -> Entries:
        """The plan of least noise; with ``copies`` it also says which of them wait in 8, 4 or 2 bits."""
        table, keep = self.subject.table, set(self.subject.table.by_key) - set(self.subject.free)
        keep = {base_key(key) for key in keep if is_saved_key(key)}
        strategy = Milp(
            noise=self.noise[noise].of,
            timeline=Timeline(table),
            granularity=granularity,
            saved_copies=lambda chosen: [save(table, chosen, name, keep=keep) for name in plans.SAVED if copies],
        )
        return strategy(table, recipe=recipe, peak_bytes=partial(peak_bytes, table), budget_bytes=budget)

    def gact(self, budget: int) -> Entries:
        """bf16 everywhere, and copies that wait in the bits of GACT's rule."""
        table = self.subject.table
        high = initial(table, NATIVE)
        waiting = [key for key in save(table, high, plans.SAVED[0]) if key in self.subject.free]
        by_bits = dict(zip((8, 4, 2), plans.SAVED, strict=True))
        noise = self.noise["along"]

        def entries(bits: Mapping[str, int]) -> Entries:
            return high | {key: Entry(by_bits[each], False) for key, each in bits.items()}

        bits = plans.gact(
            {key: noise.noise(key, by_bits[4]) * 4.0**4 for key in waiting},
            [*by_bits],
            {key: math.prod(table.by_key[key].shape) for key in waiting},
            lambda bits: peak_bytes(table, entries(bits)) <= budget,
        )
        return entries(bits)

    def optuna(self, budget: int) -> Entries:
        """A search by training, of plans that begin with greedy ones and that of milp."""
        start = self.plan(self.milp(NATIVE, budget))
        settings = Settings(budget=budget, metric="held_out_loss", maximize=False, epochs=1, seed=OWN_SEED)
        with tempfile.TemporaryDirectory() as directory:
            tuned = tune(
                lambda _: self.subject.tuned,
                storage=Path(directory) / "study.db",
                options=StudyOptions(trials=self.options.trials),
                settings=settings,
                starts=[start],
            )
        return dict(tuned.front[0].plan.entries)


# ---- what it comes to


def gap(row: Mapping[str, Any], fp32: Sequence[Mapping[str, Any]], of: str = "loss") -> list[float]:
    """By seed: ``of`` the plan's training less that of fp32."""
    return [float(run[of]) - float(base[of]) for run, base in zip(row["runs"], fp32, strict=True)]


def gaps(row: Mapping[str, Any], fp32: Sequence[Mapping[str, Any]]) -> str:
    return " ".join(f"{each:+.4f}" for each in gap(row, fp32))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's."""
    return float(spearmanr(first, second).statistic)


def agreement(drawn: Sequence[Mapping[str, Any]], fp32: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman between what is predicted and the mean gap; between seeds; and between predicted and true noise."""
    by_seed = list(zip(*(gap(row, fp32) for row in drawn), strict=True))
    mean = [statistics.fmean(gap(row, fp32)) for row in drawn]
    together = [float(row["together"]) for row in drawn]
    predicted = {name: [float(row["predicted"][name]) for row in drawn] for name in PREDICTORS}
    found = {name: rank_correlation(each, mean) for name, each in predicted.items()}
    found["together"] = rank_correlation(together, mean)
    if len(by_seed) > 1:
        found["other seeds"] = statistics.fmean(
            rank_correlation(
                one, [statistics.fmean(rest) for rest in zip(*by_seed[:at], *by_seed[at + 1 :], strict=True)]
            )
            for at, one in enumerate(by_seed)
        )
    found["third, of together"] = rank_correlation(predicted["third"], together)
    return found


def spread(values: Sequence[float]) -> float:
    """Standard deviation of one; not a number where there is one alone."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def report(found: Mapping[str, Any]) -> list[str]:
    """Markdown of one model."""
    fp32 = found["fp32"]
    losses = [float(run["loss"]) for run in fp32]
    lines = [f"### {found['description']}", "", f"fp32's loss {statistics.fmean(losses):.4f} ± {spread(losses):.4f}"]
    if len(found["drawn"]) > 1:
        rows = [gap(row, fp32) for row in found["drawn"]]
        usual = statistics.median(spread(each) for each in rows)
        means = sorted(statistics.fmean(each) for each in rows)
        lines += [
            f"{len(rows)} drawn plans: gaps {means[0]:+.4f} to {means[-1]:+.4f}, "
            f"median {statistics.median(means):+.4f}; "
            f"of one gap, the spread over the seeds {usual:.4f}",
            *(f"Spearman, {name}: {value:.3f}" for name, value in agreement(found["drawn"], fp32).items()),
        ]
    noise = found["noise"]
    steps = statistics.median(noise["seconds"]) / noise["step_seconds"]
    lines.append(f"noise of {noise['cells']} choices on {noise['batches']} batches: {steps:.0f} training steps")
    if found["searches"]:
        lines += [
            "",
            "| strategy | recipe | peak / budget | predicted noise | loss − fp32's | held-out loss − fp32's | accuracy "
            "| search, in steps |",
            "|---|" + "---|" * 7,
            *(line(row, fp32, found["peaks"][row["recipe"]]["budget"]) for row in found["searches"]),
        ]
    return lines


def line(row: Mapping[str, Any], fp32: Sequence[Mapping[str, Any]], budget: int) -> str:
    cells = [row["strategy"], row["recipe"], f"{row['peak_bytes'] / budget:.3f}", f"{row['predicted']['along']:.3g}"]
    for of in ("loss", "held_out_loss"):
        found = gap(row, fp32, of)
        cells.append(f"{statistics.fmean(found):+.4f} ± {spread(found):.4f}")
    right = [float(run["accuracy"]) for run in row["runs"]]
    cells.append(f"{statistics.fmean(right):.3f} ± {spread(right):.3f}")
    cells.append(f"{row['seconds'] / row['step_seconds']:.1f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
