"""Products of narrow matrices: that the plan takes effect in them, forward and backward, and that they are right."""

import pytest
import torch
from helpers import all_high, all_low, everything, steps, traced
from models import GPT, MLP, class_loss, tokens, vectors
from torch import nn

from assign import _torch
from assign.executor import pipeline
from assign.executor.apply import planned_step
from assign.executor.passes.narrow_products import narrow_products
from assign.formats.parsing import parse_format
from assign.numerics.promotion import Promotion
from assign.numerics.rounding import amax_scale, decode, encode, quantize
from assign.plan.compute_dtype import multiply_dtype, operators

ops = torch.ops.assign


@pytest.fixture
def on_fp8_hardware(monkeypatch):
    """A device that multiplies 8-bit matrices; a CPU does, slowly."""
    monkeypatch.setattr(_torch, "multiplies_fp8", lambda device: True)


@pytest.fixture
def counted(monkeypatch):
    """Of each joint graph: operator and whether it is backward, of every product."""
    found = []

    def count(joint, context):
        narrow_products(joint, context)
        joint.graph.lint()
        products = [n for n in joint.graph.nodes if "mm" in str(n.target) or "product.default" in str(n.target)]
        found.extend((str(n.target).removesuffix(".default"), _torch.is_backward(n)) for n in products)

        return joint

    monkeypatch.setattr(pipeline, "JOINT", (pipeline.pack, count))
    return found


def trained(plan_of, narrowed, monkeypatch, backend="eager", promotion=False):
    """Losses and gradients of two steps of a GPT, with or without the pass."""
    with monkeypatch.context() as patch:
        if not narrowed:
            patch.setattr(pipeline, "JOINT", (pipeline.pack,))
            patch.setattr(pipeline, "JOINT_COMPILED", (pipeline.pack, *pipeline.JOINT_COMPILED[2:]))
        torch.manual_seed(0)
        model, batch = GPT(width=64, length=16), tokens(batch=4, length=16)
        plan = plan_of(traced(model, batch))
        watch = Promotion(plan) if promotion else None
        step = planned_step(model, class_loss, plan, backend=backend, promotion=watch)
        return steps(model, step, batch, count=2)


def assert_near(one, other, rel):
    (losses, grads), (expected, others) = one, other
    assert losses == pytest.approx(expected, rel=rel)
    for ours, theirs in zip(grads[0], others[0], strict=True):
        assert float((ours - theirs).norm()) <= rel * float(theirs.norm())


# ---- fp8


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["native", "native-delayed"])
def test_low_products_are_of_8_bit_codes_forward_and_backward(recipe, counted, on_fp8_hardware, monkeypatch):
    trained(lambda table: all_low(table, recipe), True, monkeypatch)
    forward, backward = (
        sum(target == "assign.scaled_product" for target, back in counted if back is way) for way in (False, True)
    )
    assert (forward, backward) == (4, 9)  # all but the head, whose 20 classes are no multiple of 16
    others = [target for target, _ in counted if target != "assign.scaled_product" and "attention" not in target]
    assert others == ["aten.mm", "aten.mm"]


def test_values_rounded_by_chance_are_multiplied_as_codes_too(counted, on_fp8_hardware, monkeypatch):
    trained(lambda table: everything(table, "e4m3:pow2:sr"), True, monkeypatch)
    assert [target for target, _ in counted].count("assign.scaled_product") == 13


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_8_bit_products_give_what_bf16_gives(backend, on_fp8_hardware, monkeypatch):
    """Products of 8-bit values are exact in both; sums are in another order, and the result is rounded to bf16."""
    wide, narrow = (trained(all_low, narrowed, monkeypatch, backend) for narrowed in (False, True))
    assert_near(narrow, wide, rel=0.02)


def test_two_e5m2_matrices_are_not_multiplied_in_8_bits(counted, on_fp8_hardware, monkeypatch):
    """No device has that product."""
    trained(lambda table: everything(table, "e5m2:pow2"), True, monkeypatch)
    assert {target for target, _ in counted if "attention" not in target} == {"aten.addmm", "aten.mm"}


def test_codes_that_wait_for_the_backward_pass_are_multiplied_as_they_are(on_fp8_hardware, monkeypatch):
    graphs = []

    def keep(joint, context):
        graphs.append(joint.graph)
        return joint

    monkeypatch.setattr(pipeline, "JOINT", (*pipeline.JOINT, keep))
    trained(all_low, True, monkeypatch)
    coded = [n for n in graphs[0].nodes if n.target is ops.encode.default]
    assert len(coded) > 10
    assert not [n for n in coded if n.args[0].target is ops.decode.default]
    assert len({n.args[0] for n in coded}) == len(coded)  # nothing is coded twice


def test_nothing_is_multiplied_in_8_bits_where_the_device_cannot(counted, monkeypatch):
    trained(all_low, True, monkeypatch)
    assert {target for target, _ in counted if "attention" not in target} == {"aten.addmm", "aten.mm"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shapes", [((32, 48), (48, 64)), ((3, 16), (16, 16)), ((5, 7), (7, 9)), ((16, 16), (16, 5))])
@pytest.mark.parametrize("names", [("e4m3:pow2", "e4m3:amax"), ("e5m2:pow2", "e4m3:pow2"), ("e4m3:amax", "e5m2:amax")])
def test_scaled_product(names, shapes, bias, monkeypatch):
    """Codes and scales in, the product of the values out; sizes that the device refuses are multiplied in float32."""
    torch.manual_seed(0)
    codes, values, used, multiply = [], [], [], _torch.multiply_in_fp8
    monkeypatch.setattr(_torch, "multiply_in_fp8", lambda *args: used.append(1) or multiply(*args))
    for name, shape in zip(names, shapes, strict=True):
        x = torch.randn(shape) * 1000
        scale = amax_scale(x, name)
        code = encode(quantize(x, name, scale=scale, dtype=torch.float32), name, scale=scale)
        codes += [code, scale, name]
        values.append(decode(code, name, scale=scale, dtype=torch.float32).double())
    added = torch.randn(shapes[1][1]).bfloat16() if bias else None
    result = ops.scaled_product(*codes, added, torch.bfloat16)
    expected = values[0] @ values[1] + (added.double() if added is not None else 0)
    assert result.dtype == torch.bfloat16
    assert len(used) == (shapes[1][0] % 16 == shapes[1][1] % 16 == 0)
    assert float((result.double() - expected).norm()) <= 0.005 * float(expected.norm())


# ---- bf16


def test_products_of_emulated_formats_that_bf16_holds_are_multiplied_in_bf16(counted, monkeypatch):
    trained(lambda table: all_low(table, "hfp8"), True, monkeypatch)
    products = [(target, back) for target, back in counted if "attention" not in target]
    assert {target for target, _ in products} == {"assign.product"}
    assert [back for _, back in products].count(False) == 5
    assert [back for _, back in products].count(True) == 10


def test_they_come_out_as_those_of_float32(monkeypatch):
    wide, narrow = (trained(lambda table: all_low(table, "hfp8"), n, monkeypatch) for n in (False, True))
    assert_near(narrow, wide, rel=1e-4)


def test_formats_that_bf16_does_not_hold_stay_in_float32(counted, monkeypatch):
    trained(lambda table: all_high(table, "hfp8"), True, monkeypatch)
    assert {target for target, _ in counted if "attention" not in target} == {"aten.addmm", "aten.mm"}


@pytest.mark.parametrize("shape", [(33, 65), (4, 33, 65)])
def test_the_bf16_product_is_exact_up_to_the_order_of_sums(shape):
    torch.manual_seed(0)
    a = quantize(torch.randn(shape), "fp(4,3,4)")
    b = quantize(torch.randn(*shape[:-2], 65, 17), "fp(5,2,0)")
    result = ops.product(a, b, "fp(4,3,4)", "fp(5,2,0)")
    assert result.dtype == torch.float32
    expected = a.double() @ b.double()
    assert float((result - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    wide = torch.randn(shape)
    assert torch.equal(ops.product(wide, b, "fp(6,9,0)", "fp(5,2,0)"), wide @ b)


def test_what_is_promoted_is_multiplied_in_float32_from_then_on(monkeypatch):
    """The graph stays; the operator asks for the format in force when it runs."""
    torch.manual_seed(0)
    model, batch = MLP(), vectors()
    batch = (batch[0] * 100, batch[1])  # overflows in FP(4,3,4)
    plan = all_low(traced(model, batch), "hfp8")
    promotion = Promotion(plan)
    used = []
    multiply = _torch.multiply_in_bf16
    monkeypatch.setattr(_torch, "multiply_in_bf16", lambda a, b: used.append(1) or multiply(a, b))
    step = planned_step(model, class_loss, plan, backend="eager", promotion=promotion)
    step(batch).backward()
    first = len(used)
    assert promotion.step()
    used.clear()
    step(batch).backward()
    assert len(used) < first


class Mixed(nn.Module):
    """A bf16 tensor, widened to float32, times one that lives there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def test_a_widened_operand_is_still_narrow(counted):
    model, batch = Mixed(), vectors()
    table = traced(model, batch)
    plan = everything(table, "bf16")
    entry = next(iter(all_low(table, "hfp8").entries.values()))
    plan = plan.replace({key: type(entry)("fp(4,3,4)", True) for key in plan.entries if key.endswith("tanh")})
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    assert ("assign.product", False) in counted
    rows = {row.key: row for row in operators(table, plan.entries)}
    assert (rows["second/linear"].dtype, rows["second/linear"].multiplies) == ("float32", "bfloat16")


def test_the_rule_in_words():
    low, high, scaled = map(parse_format, ("fp(4,3,4)", "fp(6,9,0)", "e4m3:pow2"))
    assert multiply_dtype("linear", "float32", [low, low]) == "bfloat16"
    assert multiply_dtype("linear", "float32", [low, high]) == "float32"
    assert multiply_dtype("conv2d", "float32", [low, low]) == "float32"
    assert multiply_dtype("linear", "bfloat16", [scaled, scaled]) == "bfloat16"
    assert multiply_dtype("linear", "bfloat16", [scaled, scaled], fp8=True) == "float8"
    assert multiply_dtype("bmm", "bfloat16", [scaled, scaled], fp8=True) == "bfloat16"
