"""Comparisons: every number by hand, nothing trained twice, a stop that leaves no trace, foreign files refused."""

import dataclasses
import io
import json
import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import by_hand, compared
from torch import Tensor, nn
from torch.nn import functional as F

from assign.errors import AssignError, ComparisonError, PlanError
from assign.memory.estimate import low_ratio, low_ratio_bits
from assign.numerics.promotion import PromotionOptions
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe, initial
from assign.plan.table import TensorTable
from assign.report.tables import comparison_table
from assign.report.terminal import Terminal
from assign.tasks import Task
from assign.tracing.tracer import trace
from assign.training.compare import Variant, compare, load_variants, seed_range
from assign.training.comparison import Comparison, Spread
from assign.training.loop import Progress
from assign.training.options import TrainOptions

STEPS = 3
TIMES = {"step_seconds"}  # what no second run repeats


class Net(nn.Module):
    """A perceptron that draws random numbers."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(F.dropout(F.relu(self.first(x)), 0.3, self.training))
        return logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def make_task(seed: int, **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(seed)
    data = [
        (torch.randn(16, 8, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(STEPS)
    ]

    def judge(model: nn.Module) -> dict[str, float]:
        right = model(data[0][0]).argmax(1) == data[0][1]
        return {"loss": loss(model, data[0]).item(), "accuracy": right.float().mean().item()}

    fields: dict[str, Any] = {
        "name": "tiny",
        "model": Net,
        "loss": loss,
        "train": data,
        "evaluate": judge,
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "epochs": 2,
    }
    return Task(**{**fields, **changes})


def make_table() -> TensorTable:
    task = make_task(0)
    return trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)


TABLE = make_table()


def make_plan(*low: int, recipe: str = "native") -> Assignment:
    """A plan whose groups ``low`` are low."""
    entries = initial(TABLE, get_recipe(recipe), frozenset(low))
    return Assignment(entries=entries, recipe=recipe, fingerprint=TABLE.fingerprint)


FP32 = Variant(name="fp32", plan=None)
LOW = Variant(name="low", plan=make_plan(*(group.id for group in TABLE.groups)))
FIRST = Variant(name="first", plan=make_plan(TABLE.groups[0].id))
EMULATED = Variant(name="emulated", plan=make_plan(*(group.id for group in TABLE.groups), recipe="hfp8"))


def make_wide_task(seed: int) -> Task:
    """Its data is beyond FP(4,3,4), which ends at 30: promotion has something to do."""
    task = make_task(seed)
    return dataclasses.replace(task, train=[(100 * x, y) for x, y in task.train])


def results(comparison: Comparison) -> list[Any]:
    """Everything of the runs that does not depend on the clock."""
    course = [{**run.result["course"], "seconds": None} for run in comparison.runs]
    plain = [dataclasses.asdict(run) for run in comparison.runs]
    for run, steps in zip(plain, course, strict=True):
        run["result"] = {name: value for name, value in run["result"].items() if name not in TIMES}
        run["result"]["course"] = steps
    return plain


class StopError(Exception):
    """The power cut."""


def stop_after(count: int) -> Callable[[Variant, int, Progress], None]:
    left = iter(range(count))

    def on_step(_variant: Variant, _seed: int, _progress: Progress) -> None:
        if next(left, None) is None:
            raise StopError

    return on_step


class TestCompare:
    def test_trains_every_variant_with_every_seed(self) -> None:
        seen: list[tuple[str, int, int]] = []
        found = compare(
            make_task,
            [FP32, LOW],
            seeds=(0, 1),
            on_step=lambda variant, seed, progress: seen.append((variant.name, seed, progress.step)),
        )
        order = [("fp32", 0), ("low", 0), ("fp32", 1), ("low", 1)]
        assert seen == [(*pair, step) for pair in order for step in range(1, 2 * STEPS + 1)]
        assert [(run.variant, run.seed) for run in found.runs] == [("fp32", 0), ("fp32", 1), ("low", 0), ("low", 1)]
        assert len({json.dumps(run["result"]["losses"]) for run in results(found)}) == 4  # plan and seed both matter
        assert found.metric == "accuracy"  # not the task's first

    def test_low_ratios_are_those_of_the_plan(self) -> None:
        found = compare(make_task, [FP32, FIRST], seeds=[0], options=TrainOptions(epochs=1))
        plain, planned = found.runs
        assert plain.low_ratio is plain.low_ratio_bits is plain.final_low_ratio is plain.final_low_ratio_bits is None
        assert FIRST.plan
        assert 0 < low_ratio(TABLE, FIRST.plan.entries) < 1
        assert planned.low_ratio == planned.final_low_ratio == low_ratio(TABLE, FIRST.plan.entries)
        by_bits = low_ratio_bits(TABLE, FIRST.plan.entries, get_recipe("native"))
        assert planned.low_ratio_bits == planned.final_low_ratio_bits == by_bits
        assert found.epochs == 1

    def test_promotion_lowers_the_low_ratio(self) -> None:
        variants = [
            dataclasses.replace(EMULATED, name=f"every {every}", promotion=PromotionOptions(every=every))
            for every in (0, 1)
        ]
        found = compare(make_wide_task, variants, seeds=[0])
        never, always = found.runs
        assert never.final_low_ratio == never.low_ratio == always.low_ratio == 1.0
        assert always.final_low_ratio is not None
        assert 0 < always.final_low_ratio < 1
        assert [spread.promotions.mean == 0 for spread in found.summaries()] == [True, False]
        assert found.summaries()[1].fp32_metrics.keys() == {"loss", "accuracy"}

    def test_a_run_that_diverges_is_a_result(self) -> None:
        def make(seed: int) -> Task:
            task = make_task(seed)
            data = [(x * math.nan, y) if seed == 1 else (x, y) for x, y in task.train]
            return dataclasses.replace(task, train=data)

        found = compare(make, [FP32, FIRST], seeds=(0, 1, 2))
        assert [run.facts.diverged for run in found.runs] == [False, True, False] * 2
        assert [(summary.runs, summary.diverged) for summary in found.summaries()] == [(3, 1)] * 2
        assert [len(summary.metrics["accuracy"].values) for summary in found.summaries()] == [2, 2]
        assert "step 1" in found.runs[1].facts.message
        assert Comparison.from_json(json.dumps(found.to_json(), allow_nan=False)) == found

    def test_bad_input_is_refused_before_anything_is_trained(self, tmp_path: Path) -> None:
        def refuses(match: str, variants: Any, kind: type[AssignError] = ComparisonError, **changes: Any) -> None:
            options: dict[str, Any] = {"seeds": [0], "on_step": stop_after(0)}
            with pytest.raises(kind, match=match):
                compare(make_task, variants, **{**options, **changes})

        refuses("no variant", [])
        refuses("no seed", [FP32], seeds=[])
        refuses("seed 3 is given twice", [FP32], seeds=[3, 3])
        refuses("variant 'fp32' is given twice", [FP32, FP32])
        refuses("has no name", [dataclasses.replace(FP32, name="")])
        refuses("that compare sets for each run", [FP32], options=TrainOptions(seed=1))
        refuses("did you mean 'eager'", [FP32], options=TrainOptions(backend="eagre"))
        refuses("nowhere", [FP32], file=tmp_path / "nowhere" / "compare.json")
        refuses("is not JSON", [FP32], file=_written(tmp_path / "broken.json", '{"assign_comparison": 1, '))
        refuses("not a comparison", [FP32], file=_written(tmp_path / "plan.json", '{"assign_plan": 1}'))
        refuses("version 9", [FP32], file=_written(tmp_path / "newer.json", '{"assign_comparison": 9}'))
        refuses("task: Field required", [FP32], file=_written(tmp_path / "part.json", '{"assign_comparison": 1}'))
        entries = {"elsewhere": Entry("bf16", False)}
        other = Variant(name="other", plan=Assignment(entries=entries, recipe="native", fingerprint="other"))
        refuses("the plan 'other' does not fit this model", [FP32, other], PlanError)
        strange = Variant(name="strange", plan=dataclasses.replace(make_plan(), recipe="fp7"))
        refuses("fp7", [FP32, strange], AssignError)


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


class TestFile:
    def test_a_stopped_comparison_ends_as_one_that_was_not(self, tmp_path: Path) -> None:
        whole = compare(make_wide_task, (FP32, EMULATED), seeds=(0, 1))
        file = tmp_path / "compare.json"
        # before its first step; before its first checkpoint; after it; in the second run, which then goes on; …
        for steps in (0, 1, STEPS + 1, 2 * STEPS, STEPS + 2, 1):
            with pytest.raises(StopError):
                compare(make_wide_task, (FP32, EMULATED), seeds=(0, 1), file=file, on_step=stop_after(steps))
        trained: list[tuple[str, int]] = []
        before = Comparison.load(file).runs
        found = compare(
            make_wide_task,
            (FP32, EMULATED),
            seeds=(0, 1),
            file=file,
            on_run=lambda run: trained.append((run.variant, run.seed)),
        )
        assert 0 < len(before) < 4
        assert len(trained) == 4 - len(before)
        assert results(found) == results(whole)
        assert whole.summaries()[1].promotions.lowest  # promotions too are found again
        assert all(run in found.runs for run in before)  # to the last digit of their seconds
        assert Comparison.load(file) == found
        assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]

    def test_a_run_goes_on_from_its_checkpoint(self, tmp_path: Path) -> None:
        file = tmp_path / "compare.json"
        with pytest.raises(StopError):
            compare(make_task, [FP32], seeds=[0], file=file, on_step=stop_after(STEPS + 1))
        assert (tmp_path / "compare.json.fp32-0.ckpt").is_file()
        seen: list[int] = []
        compare(make_task, [FP32], seeds=[0], file=file, on_step=lambda _v, _s, progress: seen.append(progress.step))
        assert seen == [STEPS + 1, STEPS + 2, STEPS + 3]

    def test_a_checkpoint_without_its_file_is_not_trusted(self, tmp_path: Path) -> None:
        file = tmp_path / "compare.json"
        with pytest.raises(StopError):
            compare(make_task, [FP32], seeds=[0], file=file, on_step=stop_after(STEPS + 1))
        file.unlink()
        seen: list[int] = []
        compare(
            make_task,
            [FP32],
            seeds=[0],
            file=file,
            options=TrainOptions(epochs=1),
            on_step=lambda _v, _s, progress: seen.append(progress.step),
        )
        assert seen == [1, 2, 3]

    def test_more_variants_and_seeds_may_be_asked_for(self, tmp_path: Path) -> None:
        file = tmp_path / "compare.json"
        compare(make_task, [FP32], seeds=[1], file=file)
        trained: list[tuple[str, int]] = []
        found = compare(
            make_task,
            [LOW, FP32],
            seeds=(0, 1),
            file=file,
            on_run=lambda run: trained.append((run.variant, run.seed)),
        )
        assert trained == [("low", 0), ("fp32", 0), ("low", 1)]
        assert [(run.variant, run.seed) for run in found.runs] == [("low", 0), ("low", 1), ("fp32", 0), ("fp32", 1)]

    def test_another_comparisons_file_is_refused_by_what_differs(self, tmp_path: Path) -> None:
        file = tmp_path / "compare.json"
        asked: dict[str, Any] = {"variants": [FP32, FIRST], "seeds": [0, 1], "file": file}
        asked["options"] = TrainOptions(epochs=1)
        with pytest.raises(StopError):
            compare(make_task, **asked, on_step=stop_after(STEPS))
        before = file.read_text()

        def refuses(*matches: str, task: Callable[[int], Task] = make_task, **changes: Any) -> None:
            with pytest.raises(ComparisonError) as caught:
                compare(task, **{**asked, **changes})
            for match in (str(file), *matches):
                assert match in str(caught.value)
            assert file.read_text() == before

        refuses("its task is 'tiny', not 'huge'", task=partial(make_task, name="huge"))
        refuses("its model's fingerprint is", task=partial(make_task, model=partial(Net, 32)), variants=[FP32])
        refuses("its number of epochs is 1, not 2", options=TrainOptions())
        refuses("its backend is 'eager', not 'inductor'", options=TrainOptions(backend="inductor", epochs=1))
        refuses("variant 'first' has the plan", variants=[FP32, dataclasses.replace(LOW, name="first")])
        refuses(
            "variant 'first' has promote_every 0, not 5",
            variants=[FP32, dataclasses.replace(FIRST, promotion=PromotionOptions(every=5))],
        )
        refuses("has the variant 'first', which was not requested", variants=[FP32])
        refuses("has the seeds 1, which were not requested", seeds=[0])
        refuses(
            "its task", "its number of epochs", task=partial(make_task, name="huge"), options=TrainOptions(epochs=3)
        )
        half = [(x[:8], y[:8]) for x, y in make_task(0).train]
        refuses("it depends on the batch size", task=partial(make_task, train=half))

    @pytest.mark.parametrize("call", ["os.fsync", "os.replace"])
    def test_the_file_is_never_half_written(self, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "compare.json"
        found = compare(make_task, [FP32], seeds=[0], file=file, options=TrainOptions(epochs=1))
        before = file.read_text()

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(call, full)
        with pytest.raises(ComparisonError, match="No space left"):
            dataclasses.replace(found, runs=()).save(file)
        assert file.read_text() == before
        assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]

    def test_an_error_says_which_run_it_stopped(self, tmp_path: Path) -> None:
        def breaks(seed: int) -> Task:
            return make_task(seed, evaluate=lambda model: 3)

        with pytest.raises(AssignError) as caught:
            compare(breaks, [FP32], seeds=[4])
        assert any("'fp32' with seed 4" in note for note in caught.value.__notes__)


class TestVariants:
    def test_are_named_by_their_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        paths = [Path("a/plan.json"), Path("b/plan.json"), Path("c.json"), Path("fp32.json")]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            make_plan().save(path)
        variants = load_variants(paths)
        assert [v.name for v in variants] == ["fp32", "a/plan.json", "b/plan.json", "c", "fp32.json"]
        assert [v.plan is None for v in variants] == [True, False, False, False, False]
        shared = TrainOptions(promotion=PromotionOptions(every=7))
        assert [v.row(shared).promote_every for v in variants] == [0, 7, 7, 7, 7]
        assert [v.name for v in load_variants(paths[2:3], fp32=False)] == ["c"]

    def test_are_refused_by_name(self, tmp_path: Path) -> None:
        make_plan().save(tmp_path / "a.json")
        with pytest.raises(ComparisonError, match="no plan to compare"):
            load_variants([])
        with pytest.raises(ComparisonError, match=r"a\.json is given twice"):
            load_variants([tmp_path / "a.json", tmp_path / "b" / ".." / "a.json"])
        with pytest.raises(PlanError, match=r"there is no plan .*b\.json"):
            load_variants([tmp_path / "b.json"])
        with pytest.raises(ComparisonError, match="0 seeds were requested"):
            seed_range(0)
        assert list(seed_range(2)) == [0, 1]

    def test_a_recipe_says_how_often_to_promote(self) -> None:
        plan, shared = make_plan(recipe="hfp8"), TrainOptions()
        assert Variant(name="a", plan=plan).row(shared).promote_every == 1
        assert Variant(name="a", plan=plan, promotion=PromotionOptions(every=0)).row(shared).promote_every == 0
        assert FP32.row(shared).promote_every == 0


class TestSummary:
    def test_by_hand(self) -> None:
        comparison = compared(
            *(by_hand("fp32", seed, accuracy) for seed, accuracy in enumerate((0.5, 0.75, 1.0))),
            by_hand("low", 0, 0.5, promoted=1),
            by_hand("low", 1, 0.75, promoted=2),
            by_hand("low", 2, 0.0, diverged=True),
        )
        plain, low = comparison.summaries()
        assert plain.metrics["accuracy"] == Spread(values=(0.5, 0.75, 1.0))
        accuracy = plain.metrics["accuracy"]
        assert (accuracy.mean, accuracy.deviation, accuracy.lowest, accuracy.highest) == (0.75, 0.25, 0.5, 1.0)
        assert plain.fp32_metrics == plain.metrics
        assert low.fp32_metrics["accuracy"].values == (0.25, 0.5)
        assert (plain.runs, plain.diverged, plain.low_ratio) == (3, 0, None)
        assert plain.final_low_ratio.mean is None
        assert (low.runs, low.diverged, low.low_ratio, low.low_ratio_bits) == (3, 1, 0.5, 0.4)
        assert low.metrics["accuracy"].values == (0.5, 0.75)  # what diverged has no part in it
        assert low.metrics["accuracy"].deviation == statistics.stdev([0.5, 0.75])
        assert low.final_low_ratio.mean == pytest.approx(0.375)
        assert low.final_low_ratio_bits.mean == pytest.approx(0.4 - 1 / 16)
        assert low.promotions.values == (1, 2, 0)
        assert low.peak_bytes.mean == 2 * 2**20
        assert low.step_seconds.mean == 0.5
        assert low.loss.values == (1.5, 1.5)

    def test_one_value_has_no_deviation_and_none_has_nothing(self) -> None:
        assert (Spread(values=(2.0,)).mean, Spread(values=(2.0,)).deviation) == (2.0, None)
        empty = Spread(values=())
        assert empty.mean is empty.deviation is empty.lowest is empty.highest is None

    def test_json_gives_it_back(self) -> None:
        comparison = compared(by_hand("fp32", 0, 1.0), by_hand("low", 0, 0.0, diverged=True))
        data = comparison.to_json()
        assert data["summaries"][1]["diverged"] == 1
        assert data["summaries"][0]["metrics"]["accuracy"]["mean"] == 1.0
        assert Comparison.from_json(json.dumps(data)) == comparison

    def test_a_result_cut_short_is_refused(self) -> None:
        data = compared(by_hand("fp32", 0, 1.0)).to_json()
        del data["runs"][0]["result"]["diverged"]
        with pytest.raises(ComparisonError, match=r"here\.json, run 0 is not a valid comparison:\n  diverged"):
            Comparison.from_json(json.dumps(data), where="here.json")


class TestTable:
    def text(self, comparison: Comparison) -> str:
        console = Terminal(width=140, record=True, file=io.StringIO())
        console.print(comparison_table(comparison))
        return console.export_text()

    def test_says_every_number(self) -> None:
        comparison = compared(
            by_hand("fp32", 0, 0.5),
            by_hand("fp32", 1, 1.0),
            by_hand("low", 0, 0.5, promoted=1),
            by_hand("low", 1, 0.0, diverged=True),
            by_hand("bad[i]", 0, 0.5, diverged=True),  # a path, not rich's markup
            by_hand("bad[i]", 1, 0.5, diverged=True),
        )
        rows = {line.split()[1]: line for line in self.text(comparison).splitlines() if line.startswith("│")}
        assert "0.7500 ± 0.3536" in rows["fp32"]  # √(2 · 0.25²)
        assert rows["fp32"].count("0.7500 ± 0.3536") == 2  # under no plan and in fp32
        assert "0.2500" in rows["low"]  # in fp32
        assert "1.5" in rows["fp32"]
        assert "0 of 2" in rows["fp32"]
        assert "0.5000 → 0.4375" in rows["low"]
        assert "1 of 2" in rows["low"]
        assert rows["bad[i]"].count("diverged") == 2
        assert "bad[i], seed 0: it diverged at step 3." in self.text(comparison)
