"""Tensors whose values need more than a low format: masks, poles, losses, the user's own float32, compared copies."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import everything, traced
from torch import nn
from torch.nn import functional as F

from assign.executor.apply import apply, planned_step
from assign.plan.compute_dtype import operators
from assign.plan.ops import FLOAT32_RESULTS, IN_16_BIT, MATRIX_PRODUCTS
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import candidates_of, get_recipe, initial, save
from assign.plan.space import SearchSpace
from assign.plan.table import Need, TensorTable
from assign.planner import search

MIN = torch.finfo(torch.float32).min


def square(model, x):
    return model(x).square().mean()


def needs(model, batch, loss=square):
    """What activations need, by key; their gradients need the same."""
    return {row.key: row.need for row in traced(model, batch, loss).tensors if row.need and row.role == "activation"}


class Computes(nn.Module):
    """A linear layer, and a function of its result."""

    def __init__(self, function, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.function = nn.Linear(8, width), function

    def forward(self, x):
        return self.function(self.fc(x))


def vectors(rows=16):
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))


# ---- operators


def in_table(name):
    """An operator of autocast's by its name in a table."""
    if name.startswith(("linalg_", "fft_")):
        return None  # all of them
    name = re.sub(r"^_?upsample_.*", "upsample", name)
    name = re.sub(r"^(reflection|replication)_pad\dd$", "pad", name)
    return re.sub(r"(^_?grid_sampler.*|^grid_sampler)", "grid_sample", name).removesuffix("_with_indices")


def documented():
    header = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
    text = header.read_text()
    lists = text[text.index("#define AT_FORALL_FP32(_)") : text.index("#define AT_FORALL_DIFFERENT")]
    cuda = set(re.findall(r"_\((\w+)", lists)) - {"_"}
    text = (Path(torch.__file__).parent / "testing/_internal/autocast_test_lists.py").read_text()
    text = text[text.index("class AutocastCPUTestLists") :]
    lists = re.findall(r"self\.(?:torch|nn)_fp32 = \[(.*?)\n        \]", text, flags=re.DOTALL)
    return cuda, set(re.findall(r'\("(\w+)"', "".join(lists)))


def test_the_list_of_float32_operators_is_autocasts_but_for_named_exceptions():
    cuda, cpu = documented()
    assert {"pow", "cumsum", "log_softmax", "mse_loss"} <= cuda
    assert {"binary_cross_entropy_with_logits", "mse_loss"} <= cpu
    names = {in_table(name) for name in cuda | cpu} - {None}
    unknown = {name for name in names if name not in FLOAT32_RESULTS | set(IN_16_BIT)}
    assert not unknown
    assert FLOAT32_RESULTS.isdisjoint(IN_16_BIT)
    assert all(reason for reason in IN_16_BIT.values())
    assert FLOAT32_RESULTS.isdisjoint(MATRIX_PRODUCTS)


@pytest.mark.parametrize("recipe", ["native", "native-delayed", "hfp8", "bf16", "fp16"])
def test_what_a_loss_function_computes_stays_in_float32(recipe):
    def loss(model, batch):
        return ((model(batch[0]) - batch[1]).square() + 1e-6).sqrt().mean()

    table = traced(Computes(lambda y: y), (vectors(), vectors()), loss)
    rules = get_recipe(recipe)
    for low in (frozenset(), frozenset(group.id for group in table.groups)):
        entries = initial(table, rules, low)
        own = {key: entry.format for key, entry in entries.items() if key.startswith("loss/")}
        assert own.keys() >= {"loss/sub", "loss/square", "loss/sqrt", "loss/mean"}
        assert set(own.values()) == {"fp32"}
        assert entries["fc/linear"].format != "fp32"


def test_the_loss_moves_values_in_their_own_format():
    def loss(model, batch):
        logits = model(batch)[:, :-1]
        return F.cross_entropy(torch.cat([logits, logits]), torch.zeros(32, dtype=torch.long))

    found = needs(Computes(lambda y: y), vectors(), loss)
    assert found == {"loss/nll_loss": Need.FLOAT32}


def test_the_operators_of_a_list_stay_unless_a_product_reads_them():
    stays = needs(Computes(lambda y: y.exp().sum(1) + y.tanh().sum(1)), vectors(), lambda m, x: m(x)[0])
    assert stays.keys() == {"/exp", "/sum", "/sum#2"}
    assert "/exp" not in needs(Computes(lambda y: y.exp() @ y.T), vectors(), lambda m, x: m(x)[0, 0])


@pytest.mark.parametrize("name", ["cholesky", "eigvalsh", "inv", "det", "svdvals", "qr", "solve", "norm"])
def test_linear_algebra_stays_in_float32(name):
    def function(y):
        matrix = y[:8].mT @ y[:8] + torch.eye(8)
        found = getattr(torch.linalg, name)(*((matrix, y[:8]) if name == "solve" else (matrix,)))
        return (found if isinstance(found, torch.Tensor) else found[0]).sum() * 1e-3

    model, x = Computes(function), vectors()
    for recipe in ("bf16", "fp16"):
        plan = search(model, x, lambda m, x: m(x), space=recipe, low_ratio=0.0)
        assert any(entry.format == "fp32" for entry in plan.entries.values())
        value = planned_step(model, lambda m, x: m(x), plan, backend="eager")(x)
        value.backward()
        assert value.item() == pytest.approx(model(x).item(), rel=0.1)
        assert model.fc.weight.grad.isfinite().all()
        model.zero_grad()


# ---- poles


POLES = {
    "log": lambda y: ((1 - y.sigmoid()) + 1e-7).log(),
    "root": lambda y: (y.square() + 1e-6).sqrt(),
    "quotient": lambda y: y / (y.abs().mean(1, keepdim=True) + 1e-6),
    "power": lambda y: (y.square() + 1e-6).pow(-0.5),
    "reciprocal": lambda y: (y.square().mean(1) + 1e-6).reciprocal(),
    "loss inside": lambda y: F.binary_cross_entropy(y.sigmoid(), torch.zeros_like(y)),
}


@pytest.mark.parametrize("name", POLES)
def test_what_leads_to_a_pole_stays_in_float32(name):
    found = needs(Computes(POLES[name]), vectors())
    before = {"log": "/sigmoid", "loss inside": "/sigmoid", "quotient": "/mean", "reciprocal": "/mean"}
    assert found[before.get(name, "/square")] is Need.FLOAT32
    assert "fc/linear" not in found


def test_a_confidently_wrong_probability_keeps_its_gradient():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Sigmoid())
    nn.init.ones_(model[0].weight)
    batch = torch.full((64, 1), 8.0), torch.zeros(64, 1)

    def loss(model, batch):
        return F.binary_cross_entropy(model(batch[0]), batch[1])

    for recipe in ("native", "bf16", "fp16"):
        plan = search(model, batch, loss, space=recipe, low_ratio=0.0)
        model.zero_grad()
        planned_step(model, loss, plan, backend="eager")(batch).backward()
        assert 7 < model[0].weight.grad.item() < 9


# ---- the user's own float32


class Norm(nn.Module):
    """Root-mean-square normalisation by hand, as in public language models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.weight = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        y = self.fc(x)
        given = y.dtype
        wide = y.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(given)


def test_a_conversion_to_float32_is_honoured_up_to_the_way_back():
    table = traced(Norm(), vectors(), square)
    own = {key for key in needs(Norm(), vectors()) if not key.startswith("loss/")}
    assert own == {"/pow", "/mean", "/add", "/rsqrt"}  # what is multiplied goes back at once
    computes = {row.key: row.dtype for row in operators(table, initial(table, get_recipe("bf16")))}
    assert computes["/pow"] == computes["/mul"] == "float32"
    assert computes["/mul#2"] == "bfloat16"


def test_a_norm_by_hand_is_finite_in_fp16():
    model, x = Norm(), vectors() * 3000  # the squares are beyond fp16
    plan = search(model, x, square, space="fp16", low_ratio=0.0)
    found = planned_step(model, square, plan, backend="eager")(x)
    assert found.item() == pytest.approx(square(model, x).item(), rel=0.01)
    model.zero_grad()
    found.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_conversion_does_not_widen_a_product():
    model = Computes(lambda y: F.linear(y.float(), torch.eye(8)))
    table = traced(model, vectors(), square)
    assert not any(row.wide for row in table.tensors if row.op == "linear")
    planned = apply(model, everything(table, "bf16"), backend="eager")
    assert planned(vectors()).dtype == torch.float32


def test_complex_values_leave_float32_alone():
    model, x = Computes(lambda y: torch.fft.rfft(y).abs() @ torch.ones(5, 2)), vectors()
    plan = everything(traced(model, x, square), "bf16")
    found = planned_step(model, square, plan, backend="eager")(x)
    found.backward()
    assert found.item() == pytest.approx(square(model, x).item(), rel=0.05)


class Fourier(nn.Module):
    """The embedding of a time by sines of many frequencies, which are learned."""

    def __init__(self):
        super().__init__()
        self.frequencies, self.head = nn.Parameter(torch.randn(8) * 16), nn.Linear(16, 2)

    def forward(self, t):
        angles = t[:, None] * self.frequencies * 2 * math.pi
        return self.head(torch.cat([angles.sin(), angles.cos()], dim=-1))


def test_what_leads_to_a_sine_stays_in_float32():
    torch.manual_seed(0)
    model, times = Fourier(), torch.linspace(1, 9, 6)
    needed = needs(model, times)
    weights = {row.key: row.need for row in traced(model, times, square).tensors if row.role == "weight"}
    assert weights["frequencies"] is Need.FLOAT32
    assert {"/input", "/mul", "/mul#2", "/mul#3"} <= {k for k, v in needed.items() if v is Need.FLOAT32}
    assert "/cat" not in needed
    plan = search(model, times, square, space="bf16", low_ratio=0.0)
    found = planned_step(copy.deepcopy(model), square, plan, backend="eager")(times)
    assert found.item() == pytest.approx(square(model, times).item(), rel=0.02)


# ---- masks


class Attention(nn.Module):
    def __init__(self, mask, fill, rows=8):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.mask, self.fill = nn.Linear(16, 16), mask, fill
        self.register_buffer("bias", torch.zeros(rows, rows).masked_fill(~torch.ones(rows, rows).tril().bool(), fill))

    def forward(self, x):
        scores = self.q(x) @ x.transpose(1, 2)
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return MASKS[self.mask](scores, later, self.fill, self.bias).softmax(-1) @ x


def _index(scores, later, fill, _):
    scores = scores.clone()
    scores[:, later] = fill
    return scores


def _triu(scores, later, fill, _):
    return scores + torch.full(later.shape, fill).triu(1)


MASKS = {
    "masked_fill": lambda s, m, f, _: s.masked_fill(m, f),
    "masked_fill_": lambda s, m, f, _: s.clone().masked_fill_(m, f),
    "tensor": lambda s, m, f, _: s.masked_fill(m, torch.tensor(f)),
    "where": lambda s, m, f, _: torch.where(m, torch.full([], f, dtype=s.dtype), s),
    "new_full": lambda s, m, f, _: torch.where(m, s.new_full((), f), s),
    "full_like": lambda s, m, f, _: torch.where(m, torch.full_like(s, f), s),
    "index": _index,
    "triu": _triu,
    "zeros": lambda s, m, f, _: s + torch.zeros(m.shape).masked_fill(m, f),
    "scaled": lambda s, m, f, _: s + (1 - (~m).float()) * max(f, MIN),
    "buffer": lambda s, m, f, b: s + b,
    "scaled later": lambda s, m, f, b: (s + b) * 0.5 * 2,
    "clamp": lambda s, m, f, b: (s + b).clamp(min=max(f, MIN)),
    "clamp_": lambda s, m, f, b: (s + b).clamp_(min=max(f, MIN)),
    "max": lambda s, m, f, b: torch.max(s + b, torch.tensor(MIN)),
    "pad": lambda s, m, f, b: F.pad(s.masked_fill(m, f), (0, 2), value=f)[..., :8],
}


def scores_batch():
    return torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("fill", [-1e9, float("-inf"), MIN, -1e4])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_tensors_are_never_in_a_low_format(mask, fill):
    table = traced(Attention(mask, fill), scores_batch(), square)
    makes = "softmax"
    masked = next(row for row in table.tensors if row.op == makes).inputs
    assert {table.by_key[key].need for key in masked} == {Need.HIGH}
    assert "/matmul" in table.by_key
    assert not table.by_key["/matmul"].need
    for formats in ((), ("bf16", "e4m3:pow2/e5m2:pow2", "fp(3,2,3)")):
        found = candidates_of(table, get_recipe("native"), formats)
        assert {fmt.name for key in masked for fmt in (*found[key], *found[f"{key}.grad"])} == {"bf16"}


@pytest.mark.parametrize("fill", [-1e9, float("-inf"), MIN])
@pytest.mark.parametrize("mask", MASKS)
def test_sixteen_bits_hold_what_an_operator_writes(mask, fill):
    model, x = Attention(mask, fill), scores_batch()
    table = traced(model, x, square)
    plain = model(x)
    for name in ("bf16", "fp16"):
        found = apply(model, everything(table, name), backend="eager")(x)
        assert (found - plain).norm() < 0.05 * plain.norm()


def test_eight_bits_and_blocks_elsewhere_leave_masked_attention_as_it_is():
    for fill in (-1e9, float("-inf"), MIN):
        model, x = Attention("masked_fill", fill), scores_batch()
        plain = model(x)
        plan = search(model, x, square, low_ratio=1.0, space=SearchSpace(saved="int4:block64"))
        assert ((apply(model, plan, backend="eager")(x) - plain).norm() / plain.norm()) < 0.2


@pytest.mark.parametrize("fill", [-1e9, MIN])
@pytest.mark.parametrize("mask", ["masked_fill", "where", "zeros", "scaled", "index"])
def test_a_row_that_is_masked_as_a_whole_is_uniform_as_in_float32(mask, fill):
    class Whole(Attention):
        def forward(self, x):
            scores = self.q(x) @ x.transpose(1, 2)
            everywhere = torch.ones(scores.shape[-2:], dtype=torch.bool)
            return MASKS[self.mask](scores, everywhere, self.fill, self.bias).softmax(-1)

    model, x = Whole(mask, fill), scores_batch()
    table = traced(model, x, square)
    for name in ("bf16", "fp16"):
        found = apply(model, everything(table, name), backend="eager")(x)
        torch.testing.assert_close(found, model(x))
        torch.testing.assert_close(found, torch.full_like(found, 1 / 8))


def test_sizes_and_indices_are_no_masks_and_stay_as_they_are():
    model = Computes(lambda y: (y.repeat(1, 9000).view(-1, 72000)[:, :70000] + torch.full((70000,), 0.5)).mean(1, True))
    assert not any(need is Need.HIGH for need in needs(model, vectors(2)).values())
    plan = everything(traced(model, vectors(2), square), "fp16")
    found = planned_step(model, square, plan, backend="eager")(vectors(2))
    assert found.item() == pytest.approx(square(model, vectors(2)).item(), rel=0.01)


def test_a_mask_goes_into_checkpointed_blocks_and_out_again():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = Computes(lambda y: y)

        def forward(self, x):
            masked = torch.utils.checkpoint.checkpoint(self.masked, x, use_reentrant=False)
            return (masked + 1).softmax(-1)

        def masked(self, x):
            return self.inner(x).masked_fill(x > 0, -1e9)

    found = needs(Block(), vectors())
    assert {key for key, need in found.items() if need is Need.HIGH} >= {"/masked_fill", "/add"}


# ---- saved copies


POOLS = {
    "amax": lambda y: y.amax(1),
    "amin": lambda y: y.amin(1),
    "norm": lambda y: y.abs().norm(float("inf"), dim=1),
    "logsumexp": lambda y: y.logsumexp(1),
    "by hand": lambda y: ((e := (y - y.amax(1, True)).exp()) / e.sum(1, True) * y).sum(1),
    "maximum": lambda y: torch.maximum(y[:, ::2], y[:, 1::2]).sum(1),
    "quotient": lambda y: (y / (y + 3)).sum(1),
    "log": lambda y: (y + 3).log().sum(1),
}
INDEXED = {
    "max": lambda y: y.max(1).values,
    "median": lambda y: y.median(1).values,
    "sort": lambda y: y.sort(1).values[:, -3:].sum(1),
    "topk": lambda y: y.topk(3, 1).values.sum(1),
    "sum of squares": lambda y: y.square().sum(1),
}


class Pools(nn.Module):
    def __init__(self, pool):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.pool = nn.Linear(3, 64), nn.Linear(64, 1), pool

    def forward(self, x):
        return self.head(self.pool(F.gelu(self.fc(x))))


def sequences():
    return torch.randn(8, 32, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", POOLS | INDEXED)
def test_copies_that_a_backward_pass_compares_or_divides_by_are_exact(name):
    model, x = Pools((POOLS | INDEXED)[name]), sequences()
    table = traced(model, x, square)
    exact = {row.key for row in table.tensors if row.need is Need.EXACT}
    assert bool(exact) == (name in POOLS)
    square(model, x).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    for saved in ("int8:block64", "int4:block64", "mxfp8"):
        plan = search(model, x, square, low_ratio=0.0, space=SearchSpace(saved=saved))
        model.zero_grad()
        planned_step(model, square, plan, backend="eager")(x).backward()
        for parameter, gradient in zip(model.parameters(), plain, strict=True):
            assert (parameter.grad - gradient).norm() < 0.4 * gradient.norm()


def test_a_result_that_is_rounded_is_not_what_its_operand_is_compared_with():
    """The maximum in 8 bits equals none of the values in 16: compared, no element would have a gradient."""
    model, x = Pools(lambda y: y.amax(1)), sequences()
    table = traced(model, x, square)
    plan = everything(table, "bf16").replace({"/amax": Entry("e4m3:pow2", True)})
    planned_step(model, square, plan, backend="eager")(x).backward()
    assert model.fc.weight.grad.isfinite().all()


def test_only_narrower_copies_are_kept_out():
    table = traced(Pools(POOLS["amax"]), sequences(), square)
    entries = initial(table, get_recipe("native"))
    assert "/gelu.saved" not in save(table, entries, "int4:block64")
    assert "fc/linear.saved" in save(table, entries, "int4:block64")  # gelu's own operand is compared with nothing


def test_a_table_keeps_its_needs_in_a_file(tmp_path):
    table = traced(Attention("masked_fill", -1e9), scores_batch(), square)
    table.save(tmp_path / "table.json")
    again = TensorTable.load(tmp_path / "table.json")
    assert [row.need for row in again.tensors] == [row.need for row in table.tensors]
    assert isinstance(Assignment(entries={}, recipe="native", fingerprint=again.fingerprint), Assignment)


@pytest.mark.parametrize("name", ["e4m3:pow2", "e4m3:pow2:delayed"])
def test_one_nan_behind_a_where_does_not_spoil_the_gradients_of_others(name):
    """Plain training never sees it: the logarithm of a negative number is computed, and not taken."""
    model, x = Computes(lambda y: torch.where(y > 0, y.log(), 0)), vectors()
    table = traced(model, x, square)
    square(model, x).backward()
    plain = model.fc.weight.grad.clone()
    plan = everything(table, "fp32").replace({"/log": Entry(name, True)})
    model.zero_grad()
    planned_step(model, square, plan, backend="eager")(x).backward()
    assert (model.fc.weight.grad - plain).norm() < 0.2 * plain.norm()
