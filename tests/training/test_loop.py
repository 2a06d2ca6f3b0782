"""The training loop: plain without a plan, repeatable, resumable, honest about memory, clear about divergence."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assign.errors import DivergedError, PlanError, TaskError
from assign.memory.estimate import peak_bytes
from assign.numerics.promotion import THRESHOLD, PromotionOptions
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import get_recipe, initial
from assign.plan.space import SearchSpace
from assign.plan.step_options import StepOptions
from assign.plan.table import TensorTable
from assign.planner import search_table
from assign.tasks import Task, load_task
from assign.tracing.measuring import measure_peak
from assign.tracing.tracer import trace
from assign.training.history import TrainResult
from assign.training.loop import INITIAL_SCALE, Progress, needs_loss_scaling, train
from assign.training.options import TrainOptions

FIXED = {"metrics", "loss", "measured_peak_bytes", "predicted_peak_bytes", "step_seconds", "diverged"}


class Net(nn.Module):
    """Convolution, batch normalisation, dropout: what keeps state and draws random numbers."""

    def __init__(self, dropout: float = 0.0, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.dropout = dropout
        self.linear = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 3, size: int = 8, pixels: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, pixels, pixels, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def right(model: nn.Module) -> dict[str, float]:
    images, labels = batches(1, 32)[0]
    return {"accuracy": (model(images).argmax(1) == labels).float().mean().item()}


def mean_logit(model: nn.Module) -> dict[str, float]:
    return {"logit": model(batches(1, 32)[0][0]).abs().mean().item()}


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def make_task(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "name": "tiny",
        "model": Net,
        "loss": loss,
        "train": batches(),
        "evaluate": right,
        "optimizer": SGD,
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
        "epochs": 2,
    }
    return Task(**{**fields, **changes})


def make_plan(task: Task, recipe: str = "native", *, low: bool = False) -> tuple[TensorTable, Assignment]:
    table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)
    chosen = frozenset(group.id for group in table.groups) if low else frozenset()
    entries = initial(table, get_recipe(recipe), chosen)
    return table, Assignment(entries=entries, recipe=recipe, fingerprint=table.fingerprint)


def stochastic(task: Task) -> Assignment:
    """Every tensor but the loss in 8 bits, rounded stochastically."""
    _, plan = make_plan(task, low=True)
    return plan.replace({key: Entry("e4m3:pow2:sr", True) for key, entry in plan.entries.items() if entry.low})


def in_parts(task: Task, recipe: str = "hfp8") -> Assignment:
    """In micro-batches, whose BatchNorm has statistics of its own; low, so that gradients need the loss scale."""
    _, plan = make_plan(task, recipe, low=True)
    return plan.with_step(StepOptions(micro_batches=4, part_statistics=True))


def parameters(result: TrainResult) -> list[Tensor]:
    return [*result.model.state_dict().values()]


def same(a: TrainResult, b: TrainResult) -> bool:
    """Bit for bit; without the seconds, and without what only a plan has in its course."""
    steps = [[(point.step, point.loss, point.skipped) for point in result.course] for result in (a, b)]
    return a.losses == b.losses and steps[0] == steps[1] and all(map(torch.equal, parameters(a), parameters(b)))


class TestWithoutPlan:
    def test_is_plain_pytorch(self) -> None:
        result = train(make_task(), options=TrainOptions(seed=3))
        torch.manual_seed(3)
        model = Net()
        optimizer = SGD(model.parameters())
        means = []
        for rate in (0.1, 0.05):
            optimizer.param_groups[0]["lr"] = rate
            losses = []
            for batch in batches():
                optimizer.zero_grad()
                value = loss(model, batch)
                value.backward()
                optimizer.step()
                losses.append(value.item())
            means.append(sum(losses) / len(losses))
        assert result.losses == tuple(means)
        assert result.loss == means[-1]
        assert all(map(torch.equal, parameters(result), model.state_dict().values()))
        assert result.metrics == right(model.eval())
        assert (result.steps, result.diverged, result.message, result.loss_scale) == (6, False, "", None)

    def test_the_seed_decides_everything(self) -> None:
        task = make_task(model=partial(Net, dropout=0.5))
        assert same(train(task, options=TrainOptions(seed=1)), train(task, options=TrainOptions(seed=1)))
        assert not same(train(task, options=TrainOptions(seed=1)), train(task, options=TrainOptions(seed=2)))

    def test_data_does_not_depend_on_what_else_is_drawn(self) -> None:
        seen: dict[float, list[Tensor]] = {0.0: [], 0.5: []}
        images, labels = batches(1, 32)[0]
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8, shuffle=True)
        for dropout, record in seen.items():

            def watched(model: nn.Module, batch: Any, record: list[Tensor] = record) -> Tensor:
                record.append(batch[0])
                return loss(model, (batch[0], batch[1]))

            train(make_task(model=partial(Net, dropout=dropout), loss=watched, train=loader))
        assert len(seen[0.0]) == 8
        assert all(map(torch.equal, seen[0.0], seen[0.5]))
        assert not torch.equal(seen[0.0][0], seen[0.0][4])

    def test_the_users_module_is_left_alone(self) -> None:
        model = Net()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        train(make_task(model=model))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_evaluates_in_eval_mode_without_gradients(self) -> None:
        modes = []
        train(make_task(evaluate=lambda model: modes.append((model.training, torch.is_grad_enabled()))))
        assert modes == [(False, False)] * 2

    def test_stops_after_max_steps_and_tells_progress(self) -> None:
        told: list[Progress] = []
        result = train(make_task(), options=TrainOptions(max_steps=4), on_step=told.append)
        assert [(p.epoch, p.step) for p in told] == [(1, 1), (1, 2), (1, 3), (2, 4)]
        assert {(p.epochs, p.steps_per_epoch) for p in told} == {(2, 3)}
        assert result.losses == (pytest.approx(sum(p.loss for p in told[:3]) / 3), told[3].loss)
        assert result.metrics
        assert [(p.step, p.steps, p.loss) for p in result.course] == [(p.step, 1, p.loss) for p in told]
        assert {(p.overflow, p.loss_scale, p.skipped) for p in result.course} == {(None, None, 0)}
        assert all(p.seconds > 0 for p in result.course)

    def test_batches_may_be_dicts_without_a_length(self) -> None:
        class Stream:
            def __iter__(self) -> Any:
                return ({"images": images, "labels": labels} for images, labels in batches())

        by_name = make_task(train=Stream(), loss=lambda m, b: loss(m, (b["images"], b["labels"])))
        assert same(train(by_name), train(make_task()))

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"train": []}, "train has no batch. Give at least one"),
            ({"loss": lambda m, b: m(b[0])}, r"returned a tensor of shape \(8, 3\); it must be a scalar"),
            ({"loss": lambda m, b: loss(m, b).item()}, "returned a float; it must be a scalar tensor with a gradient"),
            ({"evaluate": lambda m: 0.5}, "evaluate.model. returned a float; it must be named numbers or None"),
        ],
    )
    def test_says_what_the_task_did_wrong(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(TaskError, match=said):
            train(make_task(**changes))


class TestResult:
    def test_json_has_the_fixed_fields(self) -> None:
        task = make_task()
        table, plan = make_plan(task)
        plain = json.loads(json.dumps(train(task, plan, table=table).to_json(), allow_nan=False))
        assert plain.keys() >= FIXED
        assert "model" not in plain
        assert plain["metrics"].keys() == {"accuracy"}
        assert plain["step_seconds"] > 0
        assert plain["fingerprint"] == table.fingerprint
        assert plain["course"]["loss"] == pytest.approx([p.loss for p in train(task, plan).course], rel=1e-5)
        assert train(task, options=TrainOptions(max_steps=1)).fingerprint is None

    def test_what_is_not_finite_becomes_none(self) -> None:
        result = train(make_task(loss=lambda m, b: loss(m, b) * float("nan")))
        plain = json.loads(json.dumps(result.to_json(), allow_nan=False))
        assert (plain["loss"], plain["losses"], plain["diverged"]) == (None, [None], True)

    def test_without_steady_steps_no_time_is_measured(self) -> None:
        """A step more is measured for the peak, and undone; its time would be that of a first step."""
        result = train(make_task(), options=TrainOptions(max_steps=1))
        assert result.step_seconds is None
        assert result.measured_peak_bytes == train(make_task(), options=TrainOptions(max_steps=2)).measured_peak_bytes


class TestPeak:
    def test_counts_every_byte_once(self, capfd: pytest.CaptureFixture[str]) -> None:
        held = torch.zeros(1000)

        def step() -> None:
            first = torch.zeros(500)
            torch.zeros(3000).add_(first.sum())
            torch.zeros(2000)

        peak = measure_peak(step, [held, held.view(10, 100), held[:10]])
        expected = 4 * (1000 + 500 + 3000)
        assert expected <= peak <= expected + 64  # and the scalar of the sum
        assert "profiler_start" not in capfd.readouterr().err

    def test_a_failing_step_leaves_no_profiler_running(self) -> None:
        with pytest.raises(ZeroDivisionError):
            measure_peak(lambda: 1 / 0, [])
        assert not torch.autograd._profiler_enabled()

    @pytest.mark.parametrize("planned", [False, True])
    def test_prediction_agrees_with_measurement(self, planned: bool) -> None:
        task = make_task(model=partial(Net, channels=16), train=batches(4, 16, 16))
        table, plan = make_plan(task)
        result = train(task, plan if planned else None, table=table)
        assert result.measured_peak_bytes is not None
        assert result.predicted_peak_bytes == pytest.approx(result.measured_peak_bytes, rel=0.05)

    def test_optimizer_states_count(self) -> None:
        sizes = []
        for momentum in (0.0, 0.9):
            task = make_task(
                model=lambda: nn.Linear(64, 3), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=momentum)
            )
            task = dataclasses.replace(task, train=[(torch.zeros(2, 64), torch.zeros(2).long())] * 4, evaluate=None)
            sizes.append(train(task).measured_peak_bytes or 0)
        assert sizes[1] - sizes[0] == 4 * (64 * 3 + 3)

    def test_a_smaller_batch_is_not_the_one_measured(self) -> None:
        sizes = [*batches(2, 32), *batches(1, 2)]
        assert (
            train(make_task(train=sizes)).measured_peak_bytes == train(make_task(train=sizes[:2])).measured_peak_bytes
        )


def reads(task: Task, plan: Assignment | None, steps: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a training asks a tensor for its number, and so waits for the device."""
    found = []

    def counted(read: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            found.append(read)
            return read(*arguments)

        return count

    with monkeypatch.context() as patch:
        for name in ("__float__", "__int__", "__bool__", "item", "tolist"):
            patch.setattr(Tensor, name, counted(getattr(Tensor, name)))
        train(task, plan, options=TrainOptions(max_steps=steps, promotion=PromotionOptions(every=0 if plan else None)))
    return len(found)


def test_a_step_waits_for_the_device_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the loss; with a loss scale, for whether gradients are finite, and for the scale before and after."""
    task = make_task(epochs=4, evaluate=None, scheduler=None)
    plan = make_plan(task, "hfp8")[1]
    for given, expected in ((None, 1), (plan, 4)):
        assert reads(task, given, 8, monkeypatch) - reads(task, given, 7, monkeypatch) == expected


def test_a_step_in_parts_is_predicted_and_trains_as_well() -> None:
    task = make_task(train=batches(6, 32, 16), epochs=3)
    table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer, micro_batches=4)
    plan = in_parts(task, "bf16")
    found = train(task, plan, table=table)
    whole = train(task, plan.with_step(StepOptions()), table=trace(*table_arguments(task)))
    assert found.predicted_peak_bytes == pytest.approx(found.measured_peak_bytes, rel=0.05)
    assert found.measured_peak_bytes < 0.5 * whole.measured_peak_bytes
    assert found.loss == pytest.approx(whole.loss, rel=0.1)


def table_arguments(task: Task) -> tuple[Any, ...]:
    return task.make_model(), task.first_batch(), task.loss, task.optimizer


def test_another_number_of_parts_does_not_resume(tmp_path: Path) -> None:
    task, file = make_task(), tmp_path / "run.pt"
    train(task, in_parts(task), options=TrainOptions(epochs=1, checkpoint=file))
    other = in_parts(task).with_step(StepOptions(micro_batches=2, part_statistics=True))
    with pytest.raises(TaskError, match="step"):
        train(task, other, options=TrainOptions(checkpoint=file, resume=True))


class TestCheckpoint:
    @pytest.mark.parametrize("make", [lambda task: None, lambda task: make_plan(task, "hfp8")[1], stochastic, in_parts])
    def test_resumed_equals_uninterrupted(self, tmp_path: Path, make: Callable[[Task], Assignment | None]) -> None:
        task = make_task(epochs=4)
        plan, file = make(task), tmp_path / "run.pt"
        train(task, plan, options=TrainOptions(epochs=2, checkpoint=file))
        resumed = train(task, plan, options=TrainOptions(epochs=4, checkpoint=file, resume=True))
        straight = train(task, plan)
        assert same(resumed, straight)
        assert (resumed.metrics, resumed.loss_scale) == (straight.metrics, straight.loss_scale)
        assert len(resumed.losses) == 4
        assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]

    @pytest.mark.parametrize(("steps", "make"), [(2, None), (4, None), (5, None), (5, stochastic), (5, in_parts)])
    def test_resumes_within_an_epoch(
        self, tmp_path: Path, steps: int, make: Callable[[Task], Assignment] | None
    ) -> None:
        images, labels = batches(1, 24)[0]
        data = torch.utils.data.TensorDataset(images, labels)
        task = make_task(
            model=partial(Net, dropout=0.5),
            train=torch.utils.data.DataLoader(data, batch_size=8, shuffle=True),
            evaluate=lambda _: {"drawn": torch.rand(()).item()},  # must not disturb the training's numbers
            epochs=3,
        )
        plan = make(task) if make else None
        train(task, plan, options=TrainOptions(max_steps=steps, checkpoint=tmp_path / "run.pt"))
        assert same(
            train(task, plan, options=TrainOptions(checkpoint=tmp_path / "run.pt", resume=True)), train(task, plan)
        )

    def test_written_every_few_steps(self, tmp_path: Path) -> None:
        file = tmp_path / "run.pt"
        task = make_task()

        def stop(progress: Progress) -> None:
            if progress.step == 6:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(task, options=TrainOptions(checkpoint=file, checkpoint_every=5), on_step=stop)
        assert torch.load(file, weights_only=True)["history"]["steps"] == 5
        assert same(train(task, options=TrainOptions(checkpoint=file, resume=True)), train(task))

    def test_a_finished_run_is_not_trained_again(self, tmp_path: Path) -> None:
        first = train(make_task(), options=TrainOptions(checkpoint=tmp_path / "run.pt"))
        again = train(make_task(), options=TrainOptions(checkpoint=tmp_path / "run.pt", resume=True))
        assert same(first, again)
        assert (again.steps, again.metrics, again.loss) == (6, first.metrics, first.loss)

    def test_what_cannot_be_resumed(self, tmp_path: Path) -> None:
        file = tmp_path / "run.pt"
        options = TrainOptions(checkpoint=file, resume=True)
        go_on = partial(train, options=options)
        with pytest.raises(TaskError, match="resume=True needs checkpoint="):
            train(make_task(), options=TrainOptions(resume=True))
        with pytest.raises(TaskError, match=r"there is no checkpoint .*run.pt to resume from. Start without resume"):
            go_on(make_task())
        train(make_task(), options=TrainOptions(checkpoint=file))
        with pytest.raises(
            TaskError, match=r"run.pt belongs to another run: its seed is 0, not 1. Resume with the options"
        ):
            train(make_task(), options=dataclasses.replace(options, seed=1))
        with pytest.raises(TaskError, match="its task is 'tiny', not 'other'"):
            go_on(make_task(name="other"))
        with pytest.raises(TaskError, match="its plan is 'none', not '"):
            go_on(make_task(), make_plan(make_task())[1])
        with pytest.raises(TaskError, match="belongs to another run: its model does not fit: "):
            go_on(make_task(model=partial(Net, channels=5)))
        whole = file.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"some text"):
            file.write_bytes(content)
            with pytest.raises(
                TaskError, match=r"run.pt is not a checkpoint, or it was cut off or damaged: .* Start again without"
            ):
                go_on(make_task())

    def test_a_bit_that_flipped_in_a_weight_is_seen(self, tmp_path: Path) -> None:
        """torch does not look at the checksums of its files, and such a weight was 8.8e36."""
        file = tmp_path / "run.pt"
        result = train(make_task(), options=TrainOptions(checkpoint=file))
        weight = result.model.linear.weight.detach().numpy().tobytes()
        content = bytearray(file.read_bytes())
        content[content.index(weight) + 3] ^= 0x40  # the highest bit of an exponent
        file.write_bytes(content)
        assert torch.load(file, weights_only=True)["model"]["linear.weight"].abs().max() > 1e30
        with pytest.raises(TaskError, match=r"damaged: the checksum of its part .* is wrong"):
            train(make_task(), options=TrainOptions(checkpoint=file, resume=True))
        with pytest.raises(TaskError, match=r"the checksum of its part"):
            train(make_task(), options=TrainOptions(weights=file))

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("history",), 3),
            (("history", "steps"), "6"),
            (("history", "epoch"), 9),
            (("history", "course", "points"), [{}]),
            (("history", "seconds"), [-1.0]),
            (("history", "metrics"), {"accuracy": "high"}),
            (("rng", "cpu"), torch.zeros(3, dtype=torch.uint8)),
            (("rng",), None),
            (("optimizer", "param_groups"), 5),
            (("optimizer", "state"), []),
            (("scheduler", "last_epoch"), "one"),
            (("scheduler",), {}),
            (("model",), [1]),
            (("identity",), "x"),
            (("identity", "seed"), torch.zeros(3)),
        ],
    )
    def test_whole_files_with_wrong_values_are_refused(
        self, tmp_path: Path, place: tuple[str, ...], value: Any
    ) -> None:
        """What loads is used: a wrong kind is refused before the first step, not by whatever meets it there."""
        file = tmp_path / "run.pt"
        task = make_task(scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
        train(task, options=TrainOptions(checkpoint=file))
        state = torch.load(file, weights_only=True)
        inner = state
        for name in place[:-1]:
            inner = inner[name]
        inner[place[-1]] = value
        torch.save(state, file)
        with pytest.raises(TaskError, match=r"run\.pt"):
            train(task, options=TrainOptions(checkpoint=file, resume=True))

    def test_a_failed_write_leaves_the_last_checkpoint(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = tmp_path / "run.pt"
        train(make_task(), options=TrainOptions(epochs=1, checkpoint=file))
        before = file.read_bytes()

        def fill_the_disk(_: Any, file: Any) -> None:
            file.write(b"half")
            raise OSError("no space left")

        monkeypatch.setattr(torch, "save", fill_the_disk)
        with pytest.raises(TaskError, match=r"cannot write the checkpoint .*: no space left"):
            train(make_task(), options=TrainOptions(checkpoint=file, resume=True))
        assert file.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        with pytest.raises(
            TaskError, match=r"cannot write the checkpoint .*nowhere/run.pt: .* a directory that exists"
        ):
            train(make_task(), options=TrainOptions(checkpoint=tmp_path / "nowhere" / "run.pt"))


def spoil_from(step: int, value: float = float("nan")) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that is ``value`` from that step on."""
    calls = []

    def spoiled(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return loss(model, batch) * (value if len(calls) >= step else 1.0)

    return spoiled


class TestDivergence:
    def test_stops_and_says_where(self) -> None:
        result = train(make_task(loss=spoil_from(5), epochs=4))
        good = train(make_task(), options=TrainOptions(max_steps=3))
        assert (result.diverged, result.steps, result.metrics) == (True, 5, good.metrics)
        assert result.message == (
            "training diverged at step 5 (epoch 2 of 4): the loss is nan. No plan was in use: "
            "try a lower learning rate, or look for such values in the data."
        )

    def test_has_no_metrics_before_the_first_good_epoch(self) -> None:
        result = train(make_task(loss=spoil_from(2, float("inf"))))
        assert (result.metrics, result.loss) == ({}, float("inf"))

    def test_raises_if_asked(self) -> None:
        with pytest.raises(DivergedError, match="training diverged at step 1"):
            train(make_task(loss=spoil_from(1)), raise_on_divergence=True)

    def test_metrics_that_are_not_finite_are_divergence(self) -> None:
        result = train(make_task(evaluate=lambda _: {"val_loss": float("inf")}))
        assert result.diverged
        assert "at step 3 (epoch 1 of 2): val_loss is inf." in result.message

    def test_the_last_good_checkpoint_stays(self, tmp_path: Path) -> None:
        train(make_task(loss=spoil_from(5)), options=TrainOptions(checkpoint=tmp_path / "run.pt"))
        state = torch.load(tmp_path / "run.pt", weights_only=True)
        assert state["history"]["epoch"] == 1
        assert all(torch.isfinite(value.float()).all() for value in state["model"].values())

    @pytest.mark.parametrize(
        ("recipe", "advice"), [("native", "budget."), ("hfp8", "or the recipe native, whose 8-bit")]
    )
    def test_under_a_plan_says_what_to_try(self, recipe: str, advice: str) -> None:
        images, labels = batches(1)[0]
        task = make_task(train=[(images, labels), (images * float("nan"), labels)])
        result = train(task, make_plan(make_task(), recipe)[1])
        assert "step 2 (epoch 1 of 2): the loss is nan. The plan is too narrow for this model: try" in result.message
        assert advice in result.message


class TestWithPlan:
    def test_all_float32_equals_plain_training(self) -> None:
        task = make_task()
        plan = make_plan(task)[1]
        wide = dataclasses.replace(plan, entries={key: Entry("fp32", False) for key in plan.entries})
        assert same(train(task, wide), train(task))

    def test_trains_and_judges_under_the_plan(self) -> None:
        task = make_task(epochs=3)
        table, plan = make_plan(task, low=True)
        planned, plain = train(task, plan, table=table), train(task, table=table)
        assert planned.losses != plain.losses
        assert planned.losses == pytest.approx(plain.losses, rel=0.1)
        assert planned.loss_scale is None
        plans = []
        judge = dataclasses.replace(task, evaluate=lambda model: plans.append(getattr(model, "assign_plan", None)))
        train(judge, plan, options=TrainOptions(max_steps=1))
        assert plans == [plan, None]  # under the plan, and then the same weights in fp32

    def test_the_loss_scale_grows_every_epoch(self) -> None:
        task = make_task(epochs=2)
        assert train(task, make_plan(task, "hfp8")[1]).loss_scale == INITIAL_SCALE * 4

    def test_gradients_that_are_not_finite_are_skipped(self) -> None:
        def steep(model: nn.Module, batch: Any) -> Tensor:
            return loss(model, batch) * 1e34  # finite, but not after scaling by 65536

        task = make_task(loss=steep, optimizer=partial(torch.optim.SGD, lr=1e-36), scheduler=None)
        plan = make_plan(task, "hfp8")[1]
        wide = dataclasses.replace(plan, entries={key: Entry("fp32", False) for key in plan.entries})
        result = train(task, wide)
        assert 0 < result.skipped_steps < result.steps
        assert not result.diverged
        assert result.loss_scale is not None
        assert result.loss_scale < INITIAL_SCALE
        assert sum(point.skipped for point in result.course) == result.skipped_steps
        scales = [INITIAL_SCALE, *(point.loss_scale for point in result.course)]
        for before, point in zip(scales, result.course, strict=False):
            assert (point.loss_scale < before) == bool(point.skipped)
        assert scales[-1] == result.loss_scale

    def test_an_epoch_of_skipped_steps_is_divergence(self) -> None:
        def hopeless(model: nn.Module, batch: Any) -> Tensor:
            return loss(model, batch) * 1e38

        task = make_task(loss=hopeless)
        result = train(task, make_plan(task, "hfp8")[1])
        assert result.diverged
        assert "every step of the epoch had gradients that are not finite, at any loss scale" in result.message


@pytest.mark.slow
def test_digits_learns() -> None:
    task = load_task("digits")
    table, plan = make_plan(task)
    plain, planned = (train(task, given, table=table, options=TrainOptions(max_steps=12)) for given in (None, plan))
    assert plain.losses[0] > 1.5 * plain.losses[1]
    assert planned.measured_peak_bytes < 0.6 * plain.measured_peak_bytes
    for result in (plain, planned):
        assert result.predicted_peak_bytes == pytest.approx(result.measured_peak_bytes, rel=0.05)


def test_short_gradient_formats_are_scaled_whatever_the_recipe():
    def plan(format_name, recipe="native"):
        entries = {"w": Entry(format_name, False), "w.grad": Entry(format_name, False)}
        return Assignment(entries=entries, recipe=recipe, fingerprint="")

    assert [needs_loss_scaling(plan(name)) for name in ("fp32", "bf16", "e5m2:pow2", "fp(6,9,0)")] == [False] * 4
    assert [needs_loss_scaling(plan(name)) for name in ("fp16", "e5m2", "fp(5,2,0)")] == [True] * 3
    assert needs_loss_scaling(plan("fp32", recipe="hfp8"))
    assert not needs_loss_scaling(plan("posit(8,2)"))
    assert not needs_loss_scaling(
        plan("posit(8,2):underflow", recipe="hfp8")
    )  # it never overflows: the scale would grow
    mixed = {"w.grad": Entry("posit(8,2)", False), "v.grad": Entry("fp(5,2,0)", False)}
    assert needs_loss_scaling(Assignment(entries=mixed, recipe="hfp8", fingerprint=""))


class TestPromotion:
    """A task whose images overflow the low format at once, and whose convolution does in time."""

    @staticmethod
    def bright(**changes: Any) -> Task:
        return make_task(train=[(images * 20, labels) for images, labels in batches()], **changes)

    def test_promotes_tells_and_keeps_the_first_plan(self) -> None:
        task = self.bright(epochs=4)
        table, plan = make_plan(task, "hfp8", low=True)
        told: list[Progress] = []
        result = train(task, plan, table=table, on_step=told.append)
        assert next(each.key for each in result.promotions) == "/input"
        assert result.promotions == tuple(past for step in told for past in step.promoted)
        assert [step.step for step in told for _ in step.promoted] == [past.step for past in result.promotions]
        assert result.plan == told[-1].plan
        changed = plan.diff(result.plan or plan).changed
        assert sorted(changed) == sorted(past.key for past in result.promotions)
        assert {entry.format for _, entry in changed.values()} == {"fp(6,9,0)"}
        assert json.loads(json.dumps(result.to_json()))["promotions"][0]["key"] == "/input"

    def test_can_be_turned_off_or_made_rarer(self) -> None:
        task = self.bright(epochs=1)
        plan = make_plan(task, "hfp8", low=True)[1]
        assert train(task, plan, options=TrainOptions(promotion=PromotionOptions(every=0))).promotions == ()
        assert train(task, plan, options=TrainOptions(promotion=PromotionOptions(threshold=1.0))).promotions == ()
        assert {
            past.step
            for past in train(
                task, plan, options=TrainOptions(max_steps=3, promotion=PromotionOptions(every=2))
            ).promotions
        } <= {1, 3}
        with pytest.raises(PlanError, match="every is -1"):
            train(task, plan, options=TrainOptions(promotion=PromotionOptions(every=-1)))

    def test_the_course_has_the_overflow_of_the_steps_that_were_looked_at(self) -> None:
        task = self.bright(epochs=3)
        plan = make_plan(task, "hfp8", low=True)[1]
        result = train(task, plan, options=TrainOptions(promotion=PromotionOptions(every=2)))
        by_step = {point.step: point.overflow for point in result.course}
        assert [share is None for share in by_step.values()] == [number % 2 == 0 for number in by_step]
        assert result.promote_threshold == THRESHOLD
        largest = {past.step: 0.0 for past in result.promotions}
        for past in result.promotions:
            largest[past.step] = max(largest[past.step], past.overflow_ratio)
        assert largest
        for step, share in by_step.items():
            assert share == largest[step] if step in largest else (share or 0.0) < THRESHOLD
        never = train(task, plan, options=TrainOptions(promotion=PromotionOptions(every=0)))
        assert {point.overflow for point in never.course} == {never.promote_threshold} == {None}

    def test_resumed_equals_uninterrupted(self, tmp_path: Path) -> None:
        task, file = self.bright(epochs=4), tmp_path / "run.pt"
        plan = make_plan(task, "hfp8", low=True)[1]
        straight = train(task, plan)
        before = train(task, plan, options=TrainOptions(max_steps=4, checkpoint=file, checkpoint_every=1))
        resumed = train(task, plan, options=TrainOptions(checkpoint=file, resume=True))
        assert len(before.promotions) > 0
        assert resumed.promotions[: len(before.promotions)] == before.promotions
        assert resumed.promotions == straight.promotions
        assert same(resumed, straight)
        assert resumed.epochs == straight.epochs
        assert resumed.course == straight.course
        assert len(resumed.course) == 12

    def test_every_epoch_is_judged_twice(self) -> None:
        def steep(model: nn.Module, batch: Any) -> Tensor:
            return 4 * loss(model, batch)  # its gradient leaves FP(5,2,0) once the scale has doubled twice

        task = make_task(epochs=3, evaluate=mean_logit, loss=steep)
        plan = make_plan(task, "hfp8", low=True)[1]
        result, plain = train(task, plan), train(task)
        assert len(result.epochs) == 3
        assert [epoch.loss for epoch in result.epochs] == list(result.losses)
        assert (result.epochs[-1].metrics, result.epochs[-1].fp32_metrics) == (result.metrics, result.fp32_metrics)
        with torch.no_grad():
            assert result.fp32_metrics == mean_logit(result.model.eval()) != result.metrics
        assert plain.fp32_metrics == {}
        assert result.epochs[0].loss_scale == INITIAL_SCALE * 2
        assert result.epochs[-1].loss_scale == result.loss_scale
        assert sum(epoch.skipped_steps for epoch in result.epochs) == result.skipped_steps > 0


class WideNet(nn.Module):
    """A weight of 4096 elements, large enough for 8-bit states, behind a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(1)
        self.hidden = nn.Linear(64, 64)
        self.out = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(F.gelu(self.hidden(self.bn(x).flatten(1))))
        return logits


class TestStored:
    """Plans that store masters, gradients and optimizer states."""

    @staticmethod
    def task(**changes: Any) -> Task:
        return make_task(**({"model": WideNet, "optimizer": partial(torch.optim.AdamW, lr=0.01)} | changes))

    @staticmethod
    def search(task: Task, **options: Any) -> tuple[TensorTable, Assignment]:
        table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)
        strategy = options.pop("strategy", "greedy")
        goal = {"low_ratio": 0} if strategy == "greedy" else {}
        return table, search_table(table, **goal, strategy=strategy, space=SearchSpace(**options))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "options",
        [
            {"optimizer_states": "dynamic8"},
            {"optimizer_states": "bf16", "gradients": "bf16"},
            {"strategy": "standalone", "recipe": "bf16"},
            {"master": "bf16", "optimizer_states": "dynamic4"},
        ],
    )
    def test_trains_and_resumes_bit_for_bit(self, tmp_path: Path, options: dict[str, str]) -> None:
        task, file = self.task(epochs=4), tmp_path / "run.pt"
        table, plan = self.search(task, **options)
        straight = train(task, plan, table=table)
        train(task, plan, options=TrainOptions(max_steps=5, checkpoint=file))
        resumed = train(task, plan, options=TrainOptions(checkpoint=file, resume=True))
        assert same(resumed, straight)
        assert resumed.metrics == straight.metrics
        assert straight.loss < 0.9 * straight.losses[0]
        assert straight.measured_peak_bytes is not None
        assert straight.loss_scale is None

    def test_standalone_learns_in_16_bit_alone_and_is_judged_in_fp32_too(self) -> None:
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
            task = self.task(optimizer=optimizer, epochs=4)
            table, plan = self.search(task, strategy="standalone", recipe=name)
            result = train(task, plan, table=table)
            assert {p.dtype for p in result.model.parameters()} == {dtype}
            assert result.loss_scale is None
            assert result.loss < 0.9 * result.losses[0]
            assert result.fp32_metrics.keys() == result.metrics.keys() != set()
            plain = train(task, table=table)
            assert result.loss == pytest.approx(plain.loss, rel=0.1)

    @pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
    def test_updates_are_rounded_as_asked_and_resume_bit_for_bit(self, tmp_path: Path, rounding: str) -> None:
        optimizer = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)  # most updates are below half a step of bf16
        task, file = self.task(optimizer=optimizer, epochs=4), tmp_path / "run.pt"
        table, plan = self.search(task, strategy="standalone", recipe="bf16")
        straight = train(task, plan, table=table, options=TrainOptions(update_rounding=rounding))
        assert straight.predicted_peak_bytes == peak_bytes(table, plan.entries, rounding)
        train(task, plan, options=TrainOptions(max_steps=5, checkpoint=file, update_rounding=rounding))
        assert same(
            train(task, plan, options=TrainOptions(checkpoint=file, resume=True, update_rounding=rounding)), straight
        )
        with pytest.raises(TaskError, match=f"its update_rounding is '{rounding}'"):
            train(task, plan, options=TrainOptions(checkpoint=file, resume=True))
        assert not same(straight, train(task, plan))  # to nearest most updates are lost

    @pytest.mark.parametrize("name", ["fp16", "bf16"])
    def test_goes_on_in_16_bit_from_weights_trained_in_32(self, tmp_path: Path, name: str) -> None:
        """Source: arXiv 2311.18587. The first loss is the one that fp32 would go on with; bytes of masters are half."""
        optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        file = tmp_path / "fp32.pt"
        train(self.task(optimizer=optimizer, epochs=3), options=TrainOptions(checkpoint=file))
        task = self.task(optimizer=optimizer, epochs=1)
        table, plan = self.search(task, strategy="standalone", recipe=name)
        narrow, wide = (train(task, each, table=table, options=TrainOptions(weights=file)) for each in (plan, None))
        assert narrow.losses == pytest.approx(wide.losses, rel=0.05)
        assert narrow.losses[0] < 0.95 * train(task).losses[0]
        sizes = [sum(p.nbytes for p in result.model.parameters()) for result in (narrow, wide)]
        assert 2 * sizes[0] == sizes[1]

    def test_the_optimizers_states_go_on_too(self, tmp_path: Path) -> None:
        """One step behind the momentum of fp32 is another than one from rest."""
        optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        task, file = self.task(optimizer=optimizer, epochs=1), tmp_path / "fp32.pt"
        trained = train(task, options=TrainOptions(checkpoint=file))
        torch.save(trained.model.state_dict(), tmp_path / "weights.pt")
        _, plan = self.search(task, strategy="standalone", recipe="bf16")
        for steps, same_loss in ((1, True), (2, False)):
            losses = [
                train(task, plan, options=TrainOptions(weights=weights, max_steps=steps)).losses[0]
                for weights in (file, tmp_path / "weights.pt")
            ]
            assert (losses[0] == losses[1]) is same_loss

    def test_weights_that_a_master_cannot_hold_are_refused(self, tmp_path: Path) -> None:
        task, file = self.task(), tmp_path / "fp32.pt"
        state = task.make_model().state_dict()
        key = next(iter(state))
        state[key] *= 1e6
        torch.save(state, file)
        _, plan = self.search(task, strategy="standalone", recipe="fp16")
        with pytest.raises(TaskError, match=rf"'{key}' holds .* its master is fp16, whose largest value is 65504"):
            train(task, plan, options=TrainOptions(weights=file))
        assert train(task, options=TrainOptions(weights=file, max_steps=1)).losses

    def test_a_rounding_of_updates_without_16_bit_masters_is_refused(self) -> None:
        task = self.task()
        for plan in (None, self.search(task)[1]):
            with pytest.raises(PlanError, match="for 16-bit masters, but this training has none"):
                train(task, plan, options=TrainOptions(update_rounding="kahan"))
        with pytest.raises(PlanError, match=r"'up' is not known\. Choose one of: nearest, stochastic, kahan"):
            train(task, options=TrainOptions(update_rounding="up"))

    def test_a_plan_that_stores_float32_is_plain_training(self) -> None:
        task = self.task()
        table, plan = self.search(task, strategy="uniform", formats="fp32", optimizer_states="fp32", master="fp32")
        assert same(train(task, plan, table=table), train(task))

    def test_another_plans_checkpoint_is_refused(self, tmp_path: Path) -> None:
        task, file = self.task(), tmp_path / "run.pt"
        _, plan = self.search(task)
        _, narrow = self.search(task, gradients="bf16", optimizer_states="bf16")
        train(task, plan, options=TrainOptions(checkpoint=file))
        with pytest.raises(TaskError, match="its plan is"):
            train(task, narrow, options=TrainOptions(checkpoint=file, resume=True))

    def test_an_optimizer_that_cannot_is_refused_before_anything_runs(self) -> None:
        task = self.task(optimizer=partial(torch.optim.RMSprop, lr=0.01))
        with pytest.raises(PlanError, match="no library has an optimizer RMSprop"):
            self.search(task, optimizer_states="dynamic8")

    def test_16_bit_masters_have_no_loss_scale(self) -> None:
        task = self.task()
        assert needs_loss_scaling(self.search(task, recipe="fp16")[1])
        assert not needs_loss_scaling(self.search(task, strategy="standalone", recipe="fp16")[1])
