"""Models and batches in the dtypes in which they are loaded: bf16, fp16, float64, mixed, quantized."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import adamw, all_high, all_low, everything, measured_peak, sgd, steps, traced
from models import GPT, MLP, MODELS, ResNet, class_loss, images, tokens, vectors
from torch import nn

import assign
from assign.errors import PlanError, TraceError
from assign.formats.rows import ITEM_BYTES
from assign.memory.replay import Replay
from assign.noise.options import NoiseOptions
from assign.plan.persistent_state import resident
from assign.plan.space import SearchSpace
from assign.strategies import STRATEGIES
from assign.tracing.measuring import count_bytes

B = torch.bfloat16


class Adapted(nn.Module):
    """A frozen layer in 16 bits with a small adapter in float32 beside it, as LoRA has."""

    def __init__(self, width, out, dtype=B, rank=4):
        super().__init__()
        self.base = nn.Linear(width, out, dtype=dtype).requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, width) * 0.1)
        self.b = nn.Parameter(torch.randn(out, rank) * 0.1)

    def forward(self, x):
        return self.base(x.to(B if self.base.weight.dtype == B else torch.float16)).float() + x @ self.a.T @ self.b.T


class WideNorm(nn.Module):
    """A norm in float32 inside a model in bf16."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.float()).to(x.dtype)


class Embedded(nn.Module):
    """An embedding in bf16, all else in float32; its output is made to require a gradient, as for checkpointing."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 32, dtype=B).requires_grad_(False)
        self.layer, self.head = nn.Linear(32, 32), nn.Linear(32, 20)
        self.table.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_(True))

    def forward(self, ids):
        return self.head(F.gelu(self.layer(self.table(ids).float())))


class Branching(nn.Module):
    """Code that looks at dtypes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype))
        x = F.gelu(x) if x.dtype == B else torch.tanh(x)
        return self.second(x.to(self.second.weight.dtype))


class Cast(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        with torch.autocast("cpu", dtype=B):
            x = F.gelu(self.first(x))
        return self.second(x.float())


def wide_norm():
    model = nn.Sequential(nn.Linear(16, 32), WideNorm(32), nn.GELU(), nn.Linear(32, 4)).to(B)
    model[1].norm.float()
    return model


def loss(model, batch):
    inputs, labels = batch
    outputs = model(inputs)
    return F.cross_entropy(outputs.float().reshape(-1, outputs.shape[-1]), labels.reshape(-1))


def narrow_vectors():
    inputs, labels = vectors()
    return inputs.to(B), labels


LOADED = {
    "bf16": (lambda: MLP().to(B), narrow_vectors),
    "bf16 language model": (lambda: GPT().to(B), tokens),
    "bf16 images": (lambda: ResNet().to(B), lambda: (images()[0].to(B), images()[1])),
    "fp16": (lambda: MLP().half(), lambda: (vectors()[0].half(), vectors()[1])),
    "float64": (lambda: MLP().double(), lambda: (vectors()[0].double(), vectors()[1])),
    "frozen bf16 base": (lambda: nn.Sequential(Adapted(16, 32), nn.GELU(), Adapted(32, 4)), vectors),
    "frozen fp16 base": (lambda: nn.Sequential(Adapted(16, 4, torch.float16)), vectors),
    "float32 norm": (wide_norm, narrow_vectors),
    "bf16 embedding": (Embedded, tokens),
    "branches on dtypes": (lambda: Branching().to(B), vectors),
    "autocast inside": (Cast, vectors),
}


def trained(optimizer):
    return lambda parameters: optimizer([p for p in parameters if p.requires_grad])


@pytest.mark.parametrize("name", LOADED)
def test_a_plan_that_changes_nothing_equals_the_plain_model(name):
    make, data = LOADED[name]
    torch.manual_seed(0)
    model, batch = make(), data()
    plan = assign.search(model, batch, loss, strategy="as-loaded", optimizer=adamw)
    dtypes = [p.dtype for p in model.parameters()]
    plain, planned = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = trained(sgd if "fp16" in name else adamw)  # AdamW's epsilon is zero in fp16
    losses, grads = steps(plain, lambda b: loss(plain, b), batch, 3, optimizer)
    own, own_grads = steps(planned, assign.planned_step(planned, loss, plan, backend="eager"), batch, 3, optimizer)
    assert losses == own
    for first, second in zip(grads, own_grads, strict=True):
        for a, b in zip(first, second, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b))
    assert [p.dtype for p in planned.parameters()] == dtypes
    assert all(map(torch.equal, plain.state_dict().values(), planned.state_dict().values()))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_every_plan_trains_near_the_plain_model_and_keeps_its_dtypes(name):
    make, data = LOADED[name]
    torch.manual_seed(0)
    model, batch = make(), data()
    table = traced(model, batch, loss)
    plain = copy.deepcopy(model)
    losses, _ = steps(plain, lambda b: loss(plain, b), batch, 3, trained(sgd))
    for plan in (all_high(table), all_low(table), everything(table, "bf16"), everything(table, "fp32")):
        planned = copy.deepcopy(model)
        step = assign.planned_step(planned, loss, plan, backend="eager")
        own, grads = steps(planned, step, batch, 3, trained(sgd))
        assert own == pytest.approx(losses, rel=0.1)
        assert step(batch).dtype == torch.float32  # as the user's code gives it
        for parameter, twin, gradient in zip(planned.parameters(), model.parameters(), grads[-1], strict=True):
            assert parameter.dtype == twin.dtype
            assert gradient is None or gradient.dtype == twin.dtype
        held = resident(table, plan.entries)
        assert held.parameters == count_bytes(planned.parameters())
        assert held.gradients == count_bytes(p for p in planned.parameters() if p.requires_grad)
        assert held.states == held.gradients  # SGD's momentum


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_searches_narrow_a_bf16_model_and_never_widen_it(strategy):
    model, batch = MLP(64).to(B), narrow_vectors()
    plan = assign.search(model, batch, loss, low_ratio=0.5, strategy=strategy, optimizer=adamw)
    rows = traced(model, batch, loss).by_key
    for key, entry in plan.entries.items():
        assert assign.formats.parse_format(entry.format).bits <= 8 * ITEM_BYTES[rows[key].dtype]
    assert any(entry.low for entry in plan.entries.values())
    assert not any(key.endswith(".master") for key in plan.entries)


@pytest.mark.parametrize("make_plan", [all_high, all_low], ids=["high", "low"])
@pytest.mark.parametrize("name", ["mlp", "language model", "frozen base"])
def test_the_peak_of_a_bf16_model_is_predicted(name, make_plan):
    make, data = {
        "mlp": (lambda: MLP(1024).to(B), lambda: (torch.randn(256, 16, dtype=B), torch.randint(0, 4, (256,)))),
        "language model": (lambda: GPT(20, 128, 1, 64).to(B), lambda: tokens(8, 64)),
        "frozen base": (
            lambda: nn.Sequential(Adapted(256, 256), nn.GELU(), Adapted(256, 4)),
            lambda: vectors(256, 256),
        ),
    }[name]
    torch.manual_seed(0)
    model, batch = make(), data()
    table = traced(model, batch, loss)
    baseline = Replay(table, {}).peak_bytes
    plain = copy.deepcopy(model)
    measured = measured_peak(plain, batch, lambda b: loss(plain, b), trained(sgd)(plain.parameters()))
    assert baseline == pytest.approx(measured, rel=0.1)
    plan = make_plan(table)
    step = assign.planned_step(model, loss, plan, backend="eager")
    measured = measured_peak(model, batch, step, trained(sgd)(model.parameters()))
    assert assign.estimate(table, plan).peak_bytes == pytest.approx(measured, rel=0.05)


def test_a_plan_may_widen_a_bf16_model_where_it_says_so():
    torch.manual_seed(0)
    model, batch = ResNet().to(B), (images()[0].to(B), images()[1])
    table = traced(model, batch, loss)
    plan = everything(table, "fp32")
    plain = copy.deepcopy(model).float()
    expected = loss(plain, (batch[0].float(), batch[1])).item()
    step = assign.planned_step(model, loss, plan, backend="eager")
    assert step(batch).item() == pytest.approx(expected, rel=1e-5)
    assert {p.dtype for p in model.parameters()} == {B}
    statistics = zip(model.buffers(), plain.buffers(), strict=True)
    for own, other in statistics:  # written back into the model's own buffers
        torch.testing.assert_close(own.float(), other.float(), rtol=2**-7, atol=1e-6)
    masters = assign.search(model, batch, loss, strategy="as-loaded", space=SearchSpace(master="fp32"), optimizer=sgd)
    assign.apply(model, masters, backend="eager")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_bf16_model_takes_the_optimizers_for_weights_in_16_bits():
    torch.manual_seed(0)
    model, batch = MLP().to(B), narrow_vectors()
    plan = assign.search(model, batch, loss, strategy="as-loaded", optimizer=adamw)
    step = assign.planned_step(model, loss, plan, backend="eager")
    optimizer = assign.optimizer(torch.optim.AdamW, model, plan, update_rounding="kahan", lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(step(batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    table = traced(model, batch, loss, adamw)
    more = (
        assign.estimate(table, plan.with_update_rounding("kahan")).peak_bytes - assign.estimate(table, plan).peak_bytes
    )
    assert more > 0


@pytest.mark.parametrize("method", ["first-order", "measured"])
def test_noise_of_a_bf16_model(method):
    torch.manual_seed(0)
    model, batch = MLP().to(B), narrow_vectors()
    noise = assign.measure_noise(model, [batch], loss, options=NoiseOptions(method=method))
    assert all(0 <= noise.noise(cell.key, cell.format) < 1 for cell in noise.cells)
    assert noise.noise("first.weight", "bf16") == 0 < noise.noise("first.weight", "e4m3:pow2")
    plan = assign.search(model, batch, loss, strategy="milp", low_ratio=0.5, noise=noise)
    assert any(entry.low for entry in plan.entries.values())


class FloatFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(F.gelu(self.first(x.float())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_a_plan_for_float32_batches_takes_other_ones(dtype):
    torch.manual_seed(0)
    model, (inputs, labels) = FloatFirst(), vectors()
    inputs = inputs.round()
    plan = all_low(traced(model, (inputs, labels), loss))
    step = assign.planned_step(model, loss, plan, backend="eager")
    assert step((inputs.to(dtype), labels)).item() == pytest.approx(step((inputs, labels)).item(), rel=0.02)
    table = traced(model, (inputs.to(dtype), labels), loss)
    expected = {"/input"} if dtype.is_floating_point else set()
    assert {row.key for row in table.tensors if row.op == "input" and row.role == "activation"} == expected


def test_images_as_bytes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            return self.head(F.relu(self.conv(x.float() / 255)).mean((2, 3)))

    torch.manual_seed(0)
    model, batch = Net(), (torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8), torch.randint(0, 4, (8,)))
    expected = loss(model, batch).item()
    plan = assign.search(model, batch, loss, low_ratio=1.0, optimizer=adamw)
    assert assign.planned_step(model, loss, plan, backend="eager")(batch).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("model", "batch"), [(B, torch.float32), (torch.float32, torch.float64)])
def test_a_batch_in_the_wrong_dtype_is_refused_with_its_line(model, batch):
    inputs, labels = vectors()
    with pytest.raises(TraceError, match=r"linear multiplies tensors in .*\n.*models\.py:\d+\n.*one dtype(.|\n)*to\("):
        traced(MLP().to(model), (inputs.to(batch), labels), loss)


def test_outputs_have_the_dtype_that_the_code_gives_them():
    model, batch = MLP().to(B), narrow_vectors()
    plan = everything(traced(model, batch, class_loss), "fp32")
    assert assign.apply(model, plan, backend="eager")(batch[0]).dtype == B


def test_weights_that_torchao_quantized_run_as_they_are():
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, batch = nn.Sequential(Adapted(64, 64), nn.BatchNorm1d(64), Adapted(64, 4)), vectors(width=64)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name.endswith("base"))
    kind, expected = type(model[0].base.weight), loss(model, batch).item()
    table = traced(model, batch, loss)
    assert "0.base.weight" not in table.by_key
    assert table.by_key["0.base/linear"].opaque
    assert table.buffers == ("1.running_mean", "1.running_var")
    assert table.schedule.parameter_bytes == count_bytes(model.parameters())
    for plan in (all_high(table), all_low(table)):
        planned = copy.deepcopy(model)
        step = assign.planned_step(planned, loss, plan, backend="eager")
        value = step(batch)
        value.backward()
        assert value.item() == pytest.approx(expected, rel=0.05)
        assert type(planned[0].base.weight) is kind
        assert planned[0].a.grad is not None


def test_float8_parameters_are_refused_only_where_they_are_trained():
    model = MLP()
    model.first.weight = nn.Parameter(model.first.weight.to(torch.float8_e4m3fn), requires_grad=True)
    with pytest.raises(TraceError, match=r"'first.weight' is torch.float8_e4m3fn and requires a gradient.*\n.*Allowed"):
        traced(model, vectors())


def test_copies_and_pickles_of_a_planned_model_know_what_was_loaded(tmp_path):
    torch.manual_seed(0)
    model, batch = Branching(), vectors()
    plan = assign.search(model, batch, loss, low_ratio=0.0, space=SearchSpace(master="bf16"), optimizer=sgd)
    planned = assign.apply(model, plan, backend="eager")
    torch.save(model, tmp_path / "model.pt")
    restored = torch.load(tmp_path / "model.pt", weights_only=False)
    assert {p.dtype for p in restored.parameters()} == {B}
    expected = planned(batch[0])
    for twin in (copy.deepcopy(planned), assign.apply(restored, plan, backend="eager")):
        assert torch.equal(twin(batch[0]), expected)  # by tanh, as in float32: the code is what it was
    with pytest.raises(PlanError, match="would be rounded"):
        model.load_state_dict(Branching().state_dict())


def test_a_plan_remembers_what_was_loaded_where_its_masters_are_changed():
    torch.manual_seed(0)
    model, batch = MLP().to(B), narrow_vectors()
    expected = loss(model, batch)
    plan = assign.search(model, batch, loss, strategy="as-loaded", space=SearchSpace(master="bf16+8"), optimizer=sgd)
    assert set(plan.loaded.values()) == {"bf16"}
    assert plan == assign.Assignment.from_json(plan.to_json())
    step = assign.planned_step(model, loss, plan, backend="eager")
    assert torch.equal(step(batch), expected)
    assert (
        '"loaded"'
        not in assign.search(MLP(), vectors(), loss, strategy="as-loaded", space=SearchSpace(master="bf16")).to_json()
    )


def test_the_strategy_as_loaded_takes_no_goal():
    with pytest.raises(assign.AssignError, match="'as-loaded' follows from the model alone"):
        assign.search(*_mlp(), loss, strategy="as-loaded", low_ratio=0.5)


def _mlp():
    make, data = MODELS["mlp"]
    return make(), data()
