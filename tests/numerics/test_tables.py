"""Formats registered from outside: rounded, coded, searched and trained like those of the package."""

import dataclasses
import doctest
import math
from fractions import Fraction

import pytest
import torch
from helpers import assert_same, everything, sgd, traced
from models import MLP, class_loss, vectors

import assign
from assign import SearchSpace
from assign.errors import FormatError
from assign.executor.apply import planned_step
from assign.formats import own, parsing
from assign.formats.parsing import parse_format
from assign.formats.tables import at_place, place_of
from assign.numerics.dispatch import use_compiled
from assign.numerics.rounding import decode, encode, quantize
from assign.optim.optimizers import follow
from assign.plan.plan import Assignment, Entry
from assign.training.loop import needs_loss_scaling


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Each test registers for itself alone."""
    monkeypatch.setattr(parsing, "_REGISTERED", {})
    parse_format.cache_clear()
    yield
    parse_format.cache_clear()


def log8(code: int) -> float:
    """Sign, and the logarithm in steps of 1/8, from 2^-8 to 2^7.75; code 0 is zero and 128 is NaN."""
    if code % 128 == 0:
        return math.nan if code else 0.0
    return (-1 if code > 127 else 1) * 2.0 ** ((code % 128 - 65) / 8)


def nearest_logarithm(x: float) -> float:
    """Round the logarithm, ties up; below 2^-8.5, to zero."""
    if abs(x) < 2**-8.5:
        return 0.0
    step = min(max(math.floor(math.log2(abs(x)) * 8 + 0.5), -64), 62)
    return math.copysign(2.0 ** (step / 8), x)


def linear(bits: int):
    return lambda code: (code - (code >> (bits - 1) << bits)) / 16


def by_hand(x: float, name: str) -> float:
    """The nearest value, by search in fractions; ties to the even code."""
    table = parse_format(name).layout
    found = dict(zip(table.values, table.codes, strict=True))
    return min(found, key=lambda value: (abs(Fraction(value) - Fraction(x)), found[value] % 2))


def test_docstrings() -> None:
    outcome = doctest.testmod(own)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("place", [0, 1, -1, 2**23, -(2**23), 0x7F7FFFFF, -0x7F7FFFFF])
def test_places_of_float32(place: int) -> None:
    assert place_of(at_place(place)) == place
    assert at_place(place) < at_place(place + 1) or place == 0x7F7FFFFF


@pytest.mark.parametrize("bits", [2, 4, 8, 11, 16])
def test_rounds_to_nearest_unless_it_is_told_how(bits: int) -> None:
    fmt = assign.register_format("mine", bits=bits, decode=linear(bits))
    values = torch.tensor([linear(bits)(code) for code in range(2**bits)]).sort().values
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles.nextafter(torch.tensor(9e9)), middles.nextafter(torch.tensor(-9e9))])
    x = torch.cat([x, torch.tensor([1e9, -1e9, 1e-40, -1e-40])])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))][:400] if bits > 8 else x
    wanted = torch.tensor([by_hand(value, fmt.name) if bits < 16 else round_linear(value) for value in x.tolist()])
    for compiled in (True, False):
        with use_compiled(compiled):
            assert_same(quantize(x, "mine"), wanted + 0.0)
    assert (fmt.bits, fmt.max_value, fmt.min_subnormal) == (bits, 2.0 ** (bits - 1) / 16, 1 / 16)


def round_linear(x: float) -> float:
    return min(max(round(Fraction(x) * 16), -(2**15)), 2**15 - 1) / 16


def test_rounds_as_it_is_told() -> None:
    assign.register_format("log8", bits=8, decode=log8, round=nearest_logarithm)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * 2.0 ** torch.randint(-12, 9, (5000,), generator=generator)
    wanted = torch.tensor([nearest_logarithm(value) for value in x.tolist()]) + 0.0
    assert_same(quantize(x, "log8"), wanted)
    assert not torch.equal(quantize(x, "log8"), quantize(x, assign.register_format("near8", bits=8, decode=log8)))


@pytest.mark.parametrize("bits", [2, 4, 8, 11, 16])
def test_every_code_is_coded_again(bits: int) -> None:
    fmt = assign.register_format("mine", bits=bits, decode=linear(bits))
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8 if bits <= 8 else torch.int16)
    values = decode(codes, fmt, dtype=torch.float32)
    assert values.tolist() == [linear(bits)(code) for code in range(2**bits)]
    assert torch.equal(encode(values, fmt), codes)
    assert_same(quantize(values, fmt, dtype=torch.float32), values)


def test_values_that_are_not_finite() -> None:
    fmt = assign.register_format("log8", bits=8, decode=log8, round=nearest_logarithm)
    top, x = fmt.max_value, torch.tensor([math.inf, -math.inf, math.nan, 1e9, -0.0])
    assert_same(quantize(x, "log8"), torch.tensor([top, -top, math.nan, top, 0.0]))
    assert_same(quantize(x, "log8", saturate=False), torch.tensor([math.inf, -math.inf, math.nan, math.inf, 0.0]))
    assert encode(torch.tensor([math.nan, math.inf]), "log8").tolist() == [128, 127]
    assert decode(torch.tensor([128], dtype=torch.uint8), "log8").isnan().all()
    assign.register_format("tapered", bits=8, decode=log8, round=nearest_logarithm, saturates=True)
    assert_same(quantize(x, "tapered", saturate=False), torch.tensor([math.nan, math.nan, math.nan, top, 0.0]))
    whole = assign.register_format("whole", bits=8, decode=linear(8))
    assert not whole.has_nan
    assert encode(torch.tensor([math.nan]), "whole").tolist() == [127]


def test_thresholds() -> None:
    fmt = assign.register_format("whole", bits=4, decode=linear(4))
    assert fmt.overflow_threshold == (8 + 0.5) / 16
    beyond = torch.tensor([8.5, 8.49, -8.5, 1e9]) / 16
    assert quantize(beyond, "whole", saturate=False).isinf().tolist() == [True, False, True, True]
    x = torch.tensor(fmt.underflow_threshold)
    assert quantize(x, fmt) == 0
    assert quantize(x.nextafter(torch.tensor(1.0)), fmt) == fmt.min_subnormal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Mine"}, "'Mine' cannot be the name of a format"),
        ({"name": "a:sr"}, "'a:sr' cannot be the name of a format"),
        ({"name": "e4m3"}, "there is a format 'e4m3' already"),
        ({"bits": 17}, "'mine' has 17 bits.\n  Allowed: 2 to 16"),
        ({"decode": lambda code: code + 1.0}, "'mine' has 256 finite values, from 1.0 to 256.0"),
        ({"round": lambda x: x}, r"round\(.*\) of 'mine' is .*\n  Allowed: -8.0 or -7.9375, as these"),
    ],
)
def test_what_cannot_be_registered(arguments, message) -> None:
    given = {"name": "mine", "bits": 8, "decode": linear(8), **arguments}
    with pytest.raises(FormatError, match=message):
        assign.register_format(given.pop("name"), **given)


def test_a_name_has_one_meaning() -> None:
    first = assign.register_format("mine", bits=8, decode=linear(8))
    assert assign.register_format("mine", bits=8, decode=linear(8)) is first
    with pytest.raises(FormatError, match="there is a format 'mine' already, and it is another one"):
        assign.register_format("mine", bits=8, decode=linear(8), saturates=True)
    assert parse_format("MINE") is first
    with pytest.raises(FormatError, match="not rounded stochastically"):
        parse_format("mine:sr")
    with pytest.raises(FormatError, match=r"'mien' is not a number format\. Did you mean 'mine'"):
        parse_format("mien")


def test_a_format_that_overflows_needs_a_loss_scale() -> None:
    def plan(**options):
        name = assign.register_format("log8" if options else "log8o", bits=8, decode=log8, **options).name
        return Assignment(entries={"w.grad": Entry(name, False)}, recipe="native", fingerprint="")

    assert needs_loss_scaling(plan())
    assert not needs_loss_scaling(plan(saturates=True))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_searches_saves_and_trains(backend, graphs) -> None:
    fmt = assign.register_format("log8", bits=8, decode=log8, round=nearest_logarithm)
    model, batch = MLP(), vectors()
    space = SearchSpace(formats=["bf16", "log8"])
    plan = assign.search(model, batch, class_loss, strategy="milp", low_ratio=0.5, space=space)
    assert {entry.format for entry in plan.entries.values()} == {"bf16", "log8"}
    assert Assignment.from_json(plan.to_json()).entries == plan.entries
    plan = everything(traced(model, batch), "log8")
    plan = plan.replace({f"{key}.master": Entry("log8", False) for key in dict(model.named_parameters())})
    step = planned_step(model, class_loss, plan, backend=backend)
    optimizer = follow(sgd(model.parameters()), model, plan)
    for _ in range(2):
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()
    for parameter in model.parameters():
        assert_same(quantize(parameter.detach(), fmt), parameter.detach())
        assert_same(quantize(parameter.grad, fmt), parameter.grad)
    if backend == "eager":
        codes = [n for n in graphs[0].graph.nodes if n.target is torch.ops.assign.encode.default]
        assert {n.meta["val"].dtype for n in codes} == {torch.uint8}


def test_what_another_format_contains() -> None:
    fine = assign.register_format("fine", bits=8, decode=linear(8))
    coarse = assign.register_format("coarse", bits=4, decode=lambda code: linear(4)(code) * 2)
    assert fine.contains(coarse)
    assert not coarse.contains(fine)
    assert parse_format("fp32").contains(fine)
    assert parse_format("bf16").contains(fine)
    assert not parse_format("bf16").contains(assign.register_format("log8", bits=8, decode=log8))
    assert fine.carrier == "bfloat16"
    assert parse_format("log8").carrier == "float32"
    assert dataclasses.replace(fine, name="other").contains(fine)
