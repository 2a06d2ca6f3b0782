"""Scales that are not powers of two, and scales that the steps before gave."""

import copy
import math

import pytest
import torch
from helpers import all_low, everything, measured_peak, sgd, traced
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MLP, ResNet, class_loss, images, vectors

from assign.errors import PlanError
from assign.executor.apply import apply, planned_step
from assign.formats.rows import FORMATS
from assign.memory.estimate import peak_bytes
from assign.numerics.delayed import DelayedScales
from assign.numerics.dispatch import use_compiled
from assign.numerics.rounding import amax_scale, decode, encode, quantize
from assign.numerics.runtime_formats import Runtime
from assign.plan.keys import saved_key
from assign.plan.plan import Entry

AMAX = ["e4m3:amax", "e5m2:amax"]
each_way = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "op-by-op"])


def numbers(count=4096, exponent=0, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent


# ---- amax


@pytest.mark.parametrize("name", AMAX)
@each_way
def test_the_largest_magnitude_lands_on_the_largest_value(name, compiled):
    for exponent in (-90, -3, 0, 20, 100):
        x = numbers(exponent=exponent)
        with use_compiled(compiled):
            scale = amax_scale(x, name)
            codes = encode(quantize(x, name, scale=scale, dtype=torch.float32), name, scale=scale)
        assert float(scale) == pytest.approx(float(x.abs().max()) / FORMATS[name].max_value, rel=1e-6)
        native = codes.view(torch.float8_e4m3fn if name.startswith("e4m3") else torch.float8_e5m2).float()
        assert native.abs().max() == FORMATS[name].max_value
        assert native[x.abs().argmax()].abs() == FORMATS[name].max_value


@pytest.mark.parametrize(("name", "error"), [("e4m3:amax", 0.0264), ("e5m2:amax", 0.0526)])
def test_relative_error_on_normal_numbers(name, error):
    """Source: the figures that arXiv 2209.05433's formats give on a standard normal tensor, enumerated."""
    x = numbers(2**20)
    rounded = quantize(x, name, dtype=torch.float32)
    assert float((rounded - x).norm() / x.norm()) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("name", AMAX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(exponent=st.integers(-126, 100), mantissa=st.floats(1.0, 1.99), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_values_come_back_from_their_codes_bit_for_bit(name, dtype, exponent, mantissa, seed):
    """Though a value times such a scale is rounded to the dtype it lives in."""
    x = (numbers(300, exponent, seed) * mantissa).to(dtype)
    scale = amax_scale(x, name)
    values = quantize(x, name, scale=scale, dtype=dtype)
    codes = encode(values, name, scale=scale)
    assert torch.equal(decode(codes, name, scale=scale, dtype=dtype), values)
    assert torch.equal(encode(decode(codes, name, scale=scale, dtype=dtype), name, scale=scale), codes)


def test_special_tensors_have_the_scales_of_powers_of_two():
    assert amax_scale(torch.zeros(3), "e4m3:amax") == amax_scale(torch.zeros(0), "e4m3:amax") == 1.0
    for name in ("e4m3:amax", "e5m2:amax"):  # what is not finite does not count
        assert amax_scale(torch.tensor([1.0, math.nan, -math.inf]), name) == amax_scale(torch.ones(1), name)
    tiny = quantize(torch.tensor([1e-44, 0.0, -1e-44]), "e4m3:amax")
    assert torch.equal(tiny, torch.tensor([0.0, 0.0, -0.0]))


@pytest.mark.parametrize("name", ["e4m3:amax", "e4m3:amax:delayed", "e4m3:pow2:delayed"])
def test_both_backends_compute_the_same(name):
    """The passes of the compiled backend leave out only what changes nothing."""
    losses = {}
    for backend in ("eager", "inductor"):
        torch.manual_seed(0)
        model, batch = MLP(), vectors()
        plan = everything(traced(model, batch), name)
        plan = plan.replace({key: Entry("fp32", False) for key in plan.entries if key.startswith("loss/")})
        step = planned_step(model, class_loss, plan, backend=backend)
        losses[backend] = train(model, step, batch, 3)
    assert losses["eager"] == pytest.approx(losses["inductor"], rel=2e-2)
    assert losses["eager"][2] < losses["eager"][0]


def train(model, step, batch, count, optimizer=None):
    optimizer, losses = optimizer or sgd(model.parameters()), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = step(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- delayed


DELAYED = "e4m3:pow2:delayed"


def history(plan_scales, key="0.weight"):
    found = plan_scales.history(key)
    assert found is not None
    return found


def looked_up(scales):
    """What rounding operators are given to find the history of a plan's first tensor."""
    key = next(iter(scales._formats))
    return {"runtime": Runtime({}, {key: history(scales, key)}), "key": key}


def delayed_plan(model, batch, name=DELAYED):
    return everything(traced(model, batch), name)


def test_the_scale_is_that_of_the_steps_before():
    """The first step has its own; each further one that of the largest before it, as long as that is remembered."""
    model, batch = MLP(), vectors()
    scales = DelayedScales(delayed_plan(model, batch), length=2)
    fmt, live = "e4m3:pow2", looked_up(scales)
    used = []
    for magnitude in (1.0, 1000.0, 1.0, 1.0, 1.0):
        scales.begin(True)
        x = numbers() * magnitude
        _, scale = torch.ops.assign.scale_quantize(x, DELAYED, True, torch.float32, **live)
        used.append(float(scale))
        assert torch.ops.assign.scale(x, DELAYED, **live) == scale  # a second look, as checkpointing takes it
    one, thousand = (float(amax_scale(numbers() * magnitude, fmt)) for magnitude in (1.0, 1000.0))
    assert used == [one, one, thousand, thousand, one]


@each_way
def test_beyond_the_scale_forward_and_backward_saturate_and_infinity_is_not_lost(compiled):
    model, batch = MLP(), vectors()
    scales = DelayedScales(delayed_plan(model, batch))
    live = looked_up(scales)
    with use_compiled(compiled):
        scales.begin(True)
        torch.ops.assign.scale_quantize(torch.full((64,), 448.0), DELAYED, True, torch.float32, **live)
        scales.begin(True)
        x = torch.tensor([1e6, -1e6, 1.0, math.inf, -math.inf, math.nan, 0.0, 2.0])
        forward, scale = torch.ops.assign.scale_quantize(x, DELAYED, True, torch.float32, **live)
        backward, _ = torch.ops.assign.scale_quantize(x, DELAYED, False, torch.float32, **live)
    assert scale == 1.0
    assert forward[:5].tolist() == [448.0, -448.0, 1.0, 448.0, -448.0]
    assert backward[:3].tolist() == [448.0, -448.0, 1.0]
    assert backward[3:6].isnan().all()
    assert forward[6:].tolist() == backward[6:].tolist() == [0.0, 2.0]
    scales.begin(True)
    assert history(scales, live["key"]).scale == 4096.0  # the finite ones alone say it


def test_evaluation_leaves_no_trace():
    model, batch = MLP(), vectors()
    plan = delayed_plan(model, batch)
    scales = DelayedScales(plan)
    planned = apply(model, plan, backend="eager", scales=scales)
    optimizer = sgd(model.parameters())
    train(model, lambda batch: class_loss(planned, batch), batch, 2, optimizer)
    before = {key: value.clone() if torch.is_tensor(value) else value for key, value in scales.state_dict().items()}
    with torch.no_grad():
        planned(batch[0] * 1e6)
    after = scales.state_dict()
    assert after["keys"] == before["keys"]
    assert torch.equal(after["past"], before["past"])
    assert len(before["keys"]) > 6
    assert before["past"].shape == (2, len(before["keys"]))


def test_goes_on_from_a_state_bit_for_bit():
    def make(scales=None):
        torch.manual_seed(0)
        model, batch = MLP(), vectors()
        plan = delayed_plan(model, batch, "e4m3:amax:delayed")
        scales = scales or DelayedScales(plan)
        return model, planned_step(model, class_loss, plan, backend="eager", scales=scales), batch, scales

    model, step, batch, scales = make()
    optimizer = sgd(model.parameters())
    train(model, step, batch, 3, optimizer)
    saved = scales.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    momenta = copy.deepcopy(optimizer.state_dict())
    train(model, step, batch, 2, optimizer)
    expected = [p.clone() for p in model.parameters()]
    again, step, batch, scales = make()
    scales.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    optimizer = sgd(again.parameters())
    optimizer.load_state_dict(copy.deepcopy(momenta))
    train(again, step, batch, 2, optimizer)
    assert all(map(torch.equal, again.parameters(), expected))
    fresh, step, batch, _ = make()
    fresh.load_state_dict(saved[1])
    optimizer = sgd(fresh.parameters())
    optimizer.load_state_dict(copy.deepcopy(momenta))
    train(fresh, step, batch, 2, optimizer)
    assert not all(map(torch.equal, fresh.parameters(), expected))  # its first step takes its own scales


def test_refusals():
    model, batch = MLP(), vectors()
    plan = delayed_plan(model, batch)
    with pytest.raises(PlanError, match="length is 0; give a number of steps"):
        DelayedScales(plan, length=0)
    with pytest.raises(PlanError, match="'nope', whose scale is not delayed under this plan"):
        DelayedScales(plan).load_state_dict({"keys": ["nope"], "past": None})


@pytest.mark.slow
def test_a_resnet_under_the_recipe_trains_and_its_peak_is_known():
    torch.manual_seed(0)
    model, batch = ResNet(width=32, blocks=2), images(batch=32, size=32)
    table = traced(model, batch)
    plan = all_low(table, "native-delayed")
    assert {entry.format for entry in plan.entries.values()} >= {"e4m3:pow2:delayed", "e5m2:pow2:delayed"}
    step = planned_step(model, class_loss, plan, backend="eager")
    optimizer = sgd(model.parameters())
    losses = train(model, step, batch, 6, optimizer)
    assert losses[-1] < losses[0]
    assert peak_bytes(table, plan.entries) == pytest.approx(measured_peak(model, batch, step, optimizer), rel=0.05)


def test_a_saved_copy_of_its_own_format_has_a_scale_of_its_own():
    model, batch = MLP(), vectors()
    plan = everything(traced(model, batch), "e4m3:pow2:delayed")
    key = next(key for key in plan.entries if key.endswith("/tanh"))
    DelayedScales(plan.replace({saved_key(key): Entry("int4:block64", True)}))
    plan.replace({saved_key(key): Entry("e4m3:pow2:delayed", True)})  # its activation's: not rounded again
    with pytest.raises(PlanError, match=r"takes its scale from its own values\.\n  Choose 'e5m2:pow2'"):
        plan.replace({saved_key(key): Entry("e5m2:pow2:delayed", True)})
