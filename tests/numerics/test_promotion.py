"""Promotion (arXiv 2301.13464, A4 of the specification) and the paper's goldens (A1), through both executors."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import assign
from assign import Promotion
from assign.errors import PlanError
from assign.numerics import rounding

BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
LOW, BACK, HIGH = "fp(4,3,4)", "fp(5,2,0)", "fp(6,9,0)"


class Line(nn.Module):
    """The sum of inputs times weights; the product is a tensor that the backward pass of ``asinh`` keeps."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.asinh(x * self.weight)


class Checkpointed(Line):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def total(model, batch):
    return model(batch).sum()


def plan_of(model, batch, recipe="hfp8", loss=total):
    return assign.search(model, batch, loss, low_ratio=1.0, space=recipe)


def run(model, batch, promotion, backend="eager"):
    """One training step under the promotion's plan."""
    return assign.planned_step(model, total, promotion.plan, backend=backend, promotion=promotion)(batch).backward()


def alternating(size, value):
    """Values whose sum is zero, so that the loss overflows nothing."""
    return torch.tensor([value, -value]).repeat(size // 2)


def overflowing(count, value):
    x = torch.ones(10000)
    x[:count] = value
    return x


@pytest.mark.parametrize(("count", "value", "expected"), [(100, 31.0, True), (99, 31.0, False), (100, 30.99, False)])
def test_paper_cases(count, value, expected):
    model, x = Line(10000), overflowing(count, value)
    promotion = Promotion(plan_of(model, x))
    run(model, x, promotion)
    found = {past.key: past for past in promotion.step()}
    assert ("/input" in found) == expected
    if expected:
        past = found["/input"]
        assert (past.step, past.overflow_ratio, past.from_format, past.to_format) == (1, 0.01, LOW, HIGH)
    assert promotion.overflow["/input"] == (count / 10000 if value == 31.0 else 0.0)


def test_weights_are_watched_and_gradients_are_not():
    model, x = Line(100), torch.zeros(100)
    with torch.no_grad():
        model.weight[0] = 1000
    plan = plan_of(model, x)
    promotion = Promotion(plan)
    (assign.planned_step(model, total, plan, backend="eager", promotion=promotion)(x) * 1e6).backward()
    assert [past.key for past in promotion.step()] == ["weight"]
    assert not any(key.endswith(".grad") for key in promotion.overflow)
    low = {key for key, entry in plan.entries.items() if entry.format == LOW}
    assert set(promotion.overflow) == {key for key in low if not key.endswith(".grad")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_takes_effect_at_the_next_step_alone_and_is_kept_in_its_new_width(backend, monkeypatch):
    model, x = Line(10000), alternating(10000, 100.0)
    plan = plan_of(model, x)
    promotion = Promotion(plan)
    step = assign.planned_step(model, total, plan, backend=backend, promotion=promotion)
    planned = assign.apply(model, plan, backend=backend, promotion=promotion)
    packed, kernel = [], rounding.run

    def record(work, x, scale, dtype, *rest, **options):
        if not dtype.is_floating_point:
            packed.append(dtype)
        return kernel(work, x, scale, dtype, *rest, **options)

    monkeypatch.setattr(rounding, "run", record)
    values, codes = [], []
    for _ in range(4):
        packed.clear()
        step(x).backward()
        codes.append(packed.copy())
        with torch.no_grad():
            values.append(planned(x)[0].item())
        promotion.step()
    # at first the input saturates at 30, and so the product does not overflow before the second step
    expected = [
        assign.numerics.quantize(torch.tensor(value).asinh(), LOW).item() for value in (30.0, 30.0, 100.0, 100.0)
    ]
    assert [past.key for past in promotion.promoted] == ["/input", "/mul"]
    assert values == expected
    assert codes == [[torch.uint8], [torch.uint8], [torch.int16], [torch.int16]]
    changed = plan.diff(promotion.plan).changed
    assert {key: entry.format for key, (_, entry) in changed.items()} == {"/input": HIGH, "/mul": HIGH}
    assert not any(entry.low for _, entry in changed.values())
    assert planned.assign_plan == promotion.plan


def test_inside_a_checkpointed_block():
    model, x = Checkpointed(100), alternating(100, 50.0)
    promotion = Promotion(plan_of(model, x))
    step = assign.planned_step(model, total, promotion.plan, backend="eager", promotion=promotion)
    found = []
    for _ in range(3):
        step(x).backward()
        found.append([past.key for past in promotion.step()])
    assert found == [["/input"], ["/mul"], []]


def test_measures_at_the_first_and_every_nth_step():
    model, x = Line(100), torch.zeros(100)
    promotion = Promotion(plan_of(model, x), every=3, threshold=0.5)
    step = assign.planned_step(model, total, promotion.plan, backend="eager", promotion=promotion)
    found = []
    for number in range(1, 8):
        step(x if number < 2 else alternating(100, 50.0)).backward()
        found.append([past.key for past in promotion.step()])
    assert found == [[], [], [], ["/input"], [], [], ["/mul"]]
    assert [past.step for past in promotion.promoted] == [4, 7]


def test_the_largest_share_is_that_of_the_last_look():
    """Nothing is known of a step that was not looked at; what was promoted overflows no more."""
    model, x = Line(100), alternating(100, 50.0)
    with torch.no_grad():
        model.weight[0] = 0
    promotion = Promotion(plan_of(model, x), every=2, threshold=0.5)
    step = assign.planned_step(model, total, promotion.plan, backend="eager", promotion=promotion)
    found = []
    for _ in range(5):
        step(x).backward()
        promoted = [past.key for past in promotion.step()]
        found.append((promotion.overflow_max, promotion.scalars()["assign/overflow_max"], promoted))
    assert found[0] == (1.0, 1.0, ["/input"])
    assert found[1] == (None, 1.0, [])
    assert found[2] == (0.99, 0.99, ["/mul"])
    assert found[4] == (0.0, 0.0, [])
    assert set(promotion.overflow).isdisjoint({"/input", "/mul"})


def test_never_and_where_nothing_can_overflow():
    model, x = Line(100), torch.full((100,), 1000.0)
    off = Promotion(plan_of(model, x), every=0)
    native = Promotion(plan_of(model, x, "native"), every=1)
    for promotion in (off, native):
        run(model, x, promotion)
        assert promotion.step() == ()
        assert not promotion.overflow
        assert promotion.overflow_max is None


def test_state_is_taken_over():
    model, x = Line(100), alternating(100, 50.0)
    plan = plan_of(model, x)
    first = Promotion(plan)
    for _ in range(2):
        run(model, x, first)
        assert first.step()
    second = Promotion(plan)
    run(model, torch.zeros(100), second)  # its slots are there before the state is
    second.load_state_dict(first.state_dict())
    assert (second.plan, second.promoted) == (first.plan, first.promoted)
    run(model, x, second)
    assert second.step() == ()
    third = Promotion(plan)
    third.load_state_dict(first.state_dict())
    second.load_state_dict(first.state_dict())
    assert (second.overflow, second.overflow_max) == ({}, None)  # it has not looked since
    with torch.no_grad():
        x *= 20
        values = [assign.apply(model, plan, backend="eager", promotion=p)(x)[0].item() for p in (first, second, third)]
    assert values == [assign.numerics.quantize(torch.tensor(1000.0).asinh(), LOW).item()] * 3


def test_what_cannot_be():
    model, x = Line(100), torch.zeros(100)
    plan = plan_of(model, x)
    with pytest.raises(PlanError, match="every is -1; give a number of steps, or 0"):
        Promotion(plan, every=-1)
    for threshold in (0.0, 1.5):
        with pytest.raises(PlanError, match=f"threshold is {threshold}; give a share"):
            Promotion(plan, threshold=threshold)
    other = plan.replace({"weight": dataclasses.replace(plan.entries["weight"], format=HIGH)})
    with pytest.raises(PlanError, match="made for another plan"):
        assign.apply(model, other, promotion=Promotion(plan))


FORWARD = [1.0625, 3.3, 0.1, 29.0, 100.0, 2.0**-14, 0.999 * 2.0**-14, float("inf"), -1.0625]
FORWARD_LOW = [1.125, 3.25, 0.1015625, 30.0, 30.0, 2.0**-13, 0.0, 30.0, -1.125]
BACKWARD = [1.125, 122879.0, 122880.0, 2.0**-17, 0.999 * 2.0**-17, -1.125]
BACKWARD_LOW = [1.25, 114688.0, float("inf"), 2.0**-16, 0.0, -1.25]


@pytest.mark.parametrize("backend", BACKENDS)
def test_goldens_through_the_executors(backend):
    """A1: the input is rounded on its way in, the product's gradient on its way back, the weight's to 16 bits."""
    model = Product(len(FORWARD))
    x = torch.tensor(FORWARD)
    plan = plan_of(model, torch.ones(len(FORWARD)))  # an infinity in the batch would keep it in more bits
    planned = assign.apply(model, plan, backend=backend)
    with torch.no_grad():
        assert planned(x).tolist() == FORWARD_LOW
    model = Product(len(BACKWARD))
    planned = assign.apply(model, plan_of(model, torch.ones(len(BACKWARD))), backend=backend)
    planned(torch.ones(len(BACKWARD))).backward(torch.tensor(BACKWARD))
    assert model.weight.grad.tolist() == BACKWARD_LOW
    planned = assign.apply(model, plan_of(model, torch.ones(len(BACKWARD))), backend=backend)
    model.weight.grad = None
    planned(torch.tensor([1.0009765625, 1, 1, 1, 1, 1])).backward(torch.ones(len(BACKWARD)))
    assert model.weight.grad[0].item() == 1.0  # the input was rounded to 8 bits first
    high = plan_of(model, torch.ones(len(BACKWARD))).replace(
        {key: assign.plan.plan.Entry(HIGH, False) for key in plan.entries}
    )
    planned = assign.apply(model, high, backend=backend)
    with torch.no_grad():
        assert planned(torch.full((len(BACKWARD),), 1.0009765625)).tolist() == [1.001953125] * len(BACKWARD)


class Product(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
