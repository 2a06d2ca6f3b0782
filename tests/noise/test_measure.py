"""Noise: first-order agrees with measured, and both with plain autograd; the file goes on, and knows its model."""

import dataclasses
import json

import pytest
import torch
from helpers import traced
from models import GPT, MLP, InPlace, ResNet, class_loss, images, tokens, vectors
from scipy.stats import spearmanr
from torch import nn

from assign.errors import AssignError, DivergedError, PlanError
from assign.formats.parsing import parse_format, parse_saved
from assign.noise import measure
from assign.noise.instrumented_step import ProbedStep
from assign.noise.measure import measure_noise
from assign.noise.options import NoiseOptions
from assign.noise.perturb import loss_scale, round_tensor
from assign.numerics.rounding import quantize
from assign.plan.noise_table import Cell, Method, NoiseTable, Sample
from assign.plan.plan import Entry
from assign.plan.space import SearchSpace

FORMATS = ("bf16", "e4m3:pow2/e5m2:pow2", "fp(3,2,3)")
STEPS = {
    "mlp": (MLP, vectors),
    "resnet": (ResNet, images),
    "gpt": (lambda: GPT(dropout=0.3), tokens),
    "in place": (InPlace, lambda: vectors(width=8)),
}


def untouched(x, key):
    return x


@pytest.mark.parametrize("name", STEPS)
def test_an_untouched_step_is_the_users_own(name):
    make, batch = STEPS[name][0](), STEPS[name][1]()
    before = {key: value.clone() for key, value in make.state_dict().items()}
    found = ProbedStep(make, class_loss, fused=True).run(batch, untouched, seed=3)
    assert all(torch.equal(value, before[key]) for key, value in make.state_dict().items())
    torch.manual_seed(3)
    loss = class_loss(make, batch)
    loss.backward()
    torch.testing.assert_close(found.loss, loss.detach())
    size = sum(float(p.grad.square().sum()) for p in make.parameters())
    assert sum(float(x.square().sum()) for x in found.gradients) == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_every_tensor_is_touched_once(name):
    make, batch = STEPS[name][0](), STEPS[name][1]()
    table, seen = traced(make, batch), []
    ProbedStep(make, class_loss, fused=True).run(batch, lambda x, key: (seen.append(key), x)[1], seed=0)
    rows = table.paper_tensors
    assert len(seen) == len(set(seen))
    unread = {"/input.grad"} if name != "in place" else {row.key for row in rows if row.op in ("slice", "mean", "mul")}
    assert {row.key for row in rows} - set(seen) <= unread | {"/input.grad"}  # the batch's gradient, parts overwritten


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("mlp", 0.97), ("resnet", 0.95), ("gpt", 0.97)])
def test_first_order_agrees_with_measured(name, least):
    make, batch = STEPS[name]
    model, batches = make(), [batch(), batch()]
    space = SearchSpace(recipe="hfp8", formats=FORMATS, saved=["int4:block64"])
    by_order, measured = (
        measure_noise(model, batches, class_loss, space=space, options=NoiseOptions(method=method, rtol=0))
        for method in ("first-order", "measured")
    )
    assert by_order.cells.keys() == measured.cells.keys()
    cells = list(measured.cells)
    for quantity in ("noise", "cosine"):
        values = [[getattr(table, quantity)(*cell) for cell in cells] for table in (by_order, measured)]
        assert spearmanr(*values).statistic > least
    total = [sum(table.noise(*cell) for cell in cells if cell.format == "e4m3:pow2") for table in (by_order, measured)]
    assert 0.5 < total[0] / total[1] < 2  # of the same size too, not only in the same order


def test_the_loss_changes_as_measured():
    model, batches = MLP(), [vectors(), vectors()]
    tables = [
        measure_noise(model, batches, class_loss, options=NoiseOptions(method=method, rtol=0)) for method in Method
    ]
    cells = [Cell("first.weight", "e4m3:pow2"), Cell("second/linear", "e4m3:pow2"), Cell("/input", "e4m3:pow2")]
    measured, by_order = ([table.loss(*cell) for cell in cells] for table in tables)
    assert by_order == pytest.approx(measured, rel=0.2, abs=2e-4)
    assert all(table.loss("first/linear.grad", "e5m2:pow2") == pytest.approx(0, abs=1e-6) for table in tables)


def test_rounding_every_element_is_what_the_executor_does():
    x = torch.randn(64)
    e5m2 = parse_format("fp(5,2,0)")
    assert torch.equal(round_tensor(x, "a/relu", parse_format("e4m3:pow2")), quantize(x, "e4m3:pow2"))
    small = x * 1e-6
    assert not round_tensor(small, "a/relu.grad", parse_format("fp(4,3,4)")).any()
    scale = loss_scale(e5m2, float(small.abs().max()))
    assert scale == 2.0**16
    assert torch.equal(round_tensor(small, "a/relu.grad", e5m2, scale=scale) * scale, quantize(small * scale, e5m2))
    assert loss_scale(e5m2, 1.0) * 1.0 <= e5m2.max_value < loss_scale(e5m2, 1.0) * 4 or loss_scale(e5m2, 1.0) == 2**16
    assert torch.equal(round_tensor(small, "a/relu", e5m2, scale=scale), quantize(small, e5m2))  # no gradient
    assert loss_scale(parse_format("posit(8,2)"), float(small.abs().max())) == 1
    masked = torch.tensor([-torch.inf, 1.03, torch.nan])
    assert round_tensor(masked, "a/add", parse_format("fp(4,3,4)"))[:2].tolist() == [-torch.inf, 1.0]
    assert round_tensor(x, "a/relu.saved", parse_saved("int2:block64")).unique().numel() <= 4


def test_batches_until_the_standard_error():
    model, batches = MLP(), [vectors() for _ in range(6)]
    found = measure_noise(model, batches, class_loss, options=NoiseOptions(rtol=10.0))
    assert found.batches == 2  # one has no standard error
    assert measure_noise(model, batches, class_loss, options=NoiseOptions(rtol=0, max_batches=4)).batches == 4
    assert measure_noise(model, batches, class_loss, options=NoiseOptions(rtol=0)).batches == 6
    samples = found.cells[Cell("first.weight", "bf16")]
    assert found.standard_error("first.weight", "bf16") == pytest.approx(
        abs(samples[0].gradient - samples[1].gradient) / 2
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", Method)
def test_a_killed_run_goes_on(tmp_path, monkeypatch, method):
    model, batches, file = MLP(), [vectors() for _ in range(3)], tmp_path / "noise.json"
    options = {"options": NoiseOptions(method=method, rtol=0, seed=5)}
    whole = measure_noise(model, batches, class_loss, **options)
    sample, asked = measure.sample, []

    def dies(*arguments, **more):
        for number, each in enumerate(sample(*arguments, **more)):
            if len(asked) == 2 and number == 7:
                raise Killed
            yield each
        asked.append(arguments)

    monkeypatch.setattr(measure, "_SECONDS", 0.0)
    monkeypatch.setattr(measure, "sample", dies)
    with pytest.raises(Killed):
        measure_noise(model, batches, class_loss, file=file, **options)
    stored = NoiseTable.load(file)
    counts = [len(samples) for samples in stored.cells.values()]
    assert (counts.count(3), counts.count(2)) == (7, len(counts) - 7)
    monkeypatch.setattr(measure, "sample", lambda *rest, **more: asked.append(rest) or sample(*rest, **more))
    asked.clear()
    again = measure_noise(model, batches, class_loss, file=file, **options)
    assert [len(each[3]) for each in asked] == [len(counts) - 7]
    assert again == NoiseTable.load(file)
    for cell, samples in whole.cells.items():
        assert [s.gradient for s in again.cells[cell]] == pytest.approx([s.gradient for s in samples])
    asked.clear()
    measure_noise(model, batches, class_loss, file=file, space=SearchSpace(formats=["fp(3,2,3)"]), **options)
    assert {cell.format for each in asked for cell in each[3]} == {"fp(3,2,3)"}  # what is there is not measured again


def test_a_file_of_another_model_or_another_way_is_refused(tmp_path):
    file = tmp_path / "noise.json"
    found = measure_noise(MLP(), [vectors()], class_loss, file=file)
    with pytest.raises(PlanError, match=f"another model: its fingerprint is {found.fingerprint}, this model's is"):
        measure_noise(GPT(), [tokens()], class_loss, file=file)
    with pytest.raises(PlanError, match="with method first-order, but measured was requested"):
        measure_noise(MLP(), [vectors()], class_loss, file=file, options=NoiseOptions(method="measured"))
    with pytest.raises(PlanError, match="with loss scaling False, but True was requested"):
        measure_noise(MLP(), [vectors()], class_loss, file=file, space="hfp8")
    with pytest.raises(PlanError, match="no batch was given"):
        measure_noise(MLP(), [], class_loss)
    with pytest.raises(PlanError, match="no method 'exact'; choose from measured, first-order"):
        measure_noise(MLP(), [vectors()], class_loss, options=NoiseOptions(method="exact"))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def test_a_warm_up_trains_a_copy_on_the_first_batches(tmp_path):
    torch.manual_seed(0)
    model, batches = MLP(), [vectors() for _ in range(6)]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file, options = tmp_path / "noise.json", NoiseOptions(rtol=0.0, warm_up=4)
    found = measure_noise(model, iter(batches), class_loss, optimizer=sgd, options=options, file=file)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (found.warm_up, found.batches) == (4, 2)
    assert NoiseTable.load(tmp_path / "noise.json") == found
    optimizer = sgd(model.parameters())
    for batch in batches[:4]:
        optimizer.zero_grad()
        class_loss(model, batch).backward()
        optimizer.step()
    by_hand = measure_noise(model, batches[4:], class_loss, options=NoiseOptions(rtol=0.0))
    assert by_hand.cells == found.cells
    for batch in (*batches[4:], *batches[:2]):
        optimizer.zero_grad()
        class_loss(model, batch).backward()
        optimizer.step()
    by_hand = measure_noise(model, batches, class_loss, options=NoiseOptions(rtol=0.0))
    model.load_state_dict(before)
    again = measure_noise(model, batches, class_loss, optimizer=sgd, options=NoiseOptions(rtol=0.0, warm_up=8))
    assert again.cells == by_hand.cells  # batches of a list are trained on in turn, and measured from the first
    at_start = measure_noise(MLP(), batches[4:], class_loss, options=NoiseOptions(rtol=0.0))
    assert at_start.noise("first.weight", "e4m3:pow2") != found.noise("first.weight", "e4m3:pow2")
    with pytest.raises(PlanError, match="measured with warm up 4, but 0 was requested"):
        measure_noise(model, batches, class_loss, options=NoiseOptions(rtol=0.0), file=file)
    with pytest.raises(PlanError, match="a warm-up of 2 steps needs an optimizer"):
        measure_noise(model, batches, class_loss, options=NoiseOptions(warm_up=2))
    with pytest.raises(PlanError, match="the warm-up has 7 steps, but there are only 6 batches"):
        measure_noise(model, iter(batches), class_loss, optimizer=sgd, options=NoiseOptions(warm_up=7))
    with pytest.raises(PlanError, match="no batch was given"):
        measure_noise(model, iter(batches), class_loss, optimizer=sgd, options=NoiseOptions(warm_up=6))


def test_bad_files_say_what_is_wrong(tmp_path):
    file = tmp_path / "noise.json"
    with pytest.raises(PlanError, match=r"there is no table of noise .*noise.json"):
        NoiseTable.load(file)
    for text, fact in (
        ("{", "is not JSON"),
        ('{"assign_plan": 1}', "assign_noise"),
        ("[1]", "not a valid table of noise"),
    ):
        file.write_text(text)
        with pytest.raises(PlanError, match=fact):
            NoiseTable.load(file)
    with pytest.raises(PlanError, match="cannot write the table of noise"):
        NoiseTable(fingerprint="", method=Method.MEASURED).save(tmp_path / "none" / "noise.json")


def test_noise_of_a_plan_is_the_sum_of_what_is_rounded():
    cells = {
        Cell("a/relu", "bf16"): (Sample(1.0, 0.5, 0.0), Sample(3.0, 0.5, 0.0)),
        Cell("a/relu.saved", "int4:block64"): (Sample(10.0, 0.5, 0.0),),
        Cell("w", "bf16"): (Sample(100.0, 0.5, 0.0),),
    }
    table = NoiseTable(fingerprint="f", method=Method.MEASURED, cells=cells)
    entries = {"a/relu": Entry("bf16", False), "w": Entry("fp32", False), "w.master": Entry("bf16", False)}
    assert table.of(entries) == 2
    assert table.of(entries | {"a/relu.saved": Entry("bf16", False)}) == 2
    assert table.of(entries | {"a/relu.saved": Entry("int4:block64", False), "w": Entry("bf16", False)}) == 112
    with pytest.raises(PlanError, match=r"'w' in fp16 was not measured; measured for it: bf16"):
        table.of({"w": Entry("fp16", False)})


class Twice(nn.Module):
    """``cdist``'s backward pass has no derivative of its own where p is odd."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cdist(self.fc(x), x, p=3.0)


def test_what_cannot_be_differentiated_twice_is_measured():
    def loss(model, batch):
        return model(batch).sum()

    batch = torch.randn(4, 8)
    torch.manual_seed(0)
    model = Twice()
    found, measured = (
        measure_noise(model, [batch], loss, options=NoiseOptions(method=each)) for each in ("first-order", "measured")
    )
    assert found.method is Method.FIRST_ORDER
    assert found.cells.keys() == measured.cells.keys()
    for cell in found.cells:
        if cell.key in ("fc.weight", "fc/linear"):  # before the operator
            assert found.noise(cell.key, cell.format) == measured.noise(cell.key, cell.format)
    assert found.noise("fc.weight", "e4m3:pow2") > 0


class Grouped(nn.Module):
    """Groups are normalised by one fused operator, whose backward pass torch can only differentiate in parts."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.up = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        y = nn.functional.silu(self.norm(self.down(x)))
        return self.up(nn.functional.interpolate(y, scale_factor=2.0, mode="bicubic"))


def test_parts_run_in_the_place_of_an_operator_that_cannot_be_differentiated_twice(monkeypatch):
    torch.manual_seed(0)
    model, batch = Grouped(), torch.randn(4, 3, 8, 8)

    def loss(model, batch):
        return (model(batch) - batch).square().mean()

    steps = []
    original = ProbedStep.run
    monkeypatch.setattr(ProbedStep, "run", lambda self, *args, **kw: (steps.append(1), original(self, *args, **kw))[1])
    found = measure_noise(model, [batch], loss)
    assert len(steps) <= 3  # the first ones say which operators these are
    measured = measure_noise(model, [batch], loss, options=NoiseOptions(method="measured"))
    pairs = [(found.noise(c.key, c.format), measured.noise(c.key, c.format)) for c in found.cells]
    assert all(first == pytest.approx(second, rel=0.7) for first, second in pairs if second > 1e-5)
    assert sum(second > 1e-5 for _, second in pairs) > 10


def test_a_derivative_that_is_not_finite_is_measured():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(x).relu().norm(dim=1)  # a row of zeros: the derivative of the root's gradient is infinite

    torch.manual_seed(0)
    model, batch = Root(), torch.cat([torch.randn(7, 8), torch.zeros(1, 8)])
    with torch.no_grad():
        model.fc.bias.fill_(-0.1)
    found = measure_noise(model, [batch], lambda model, batch: model(batch).square().mean())
    assert all(sample.gradient < 1 for samples in found.cells.values() for sample in samples)


def test_steps_with_nothing_to_compare_are_refused():
    with pytest.raises(DivergedError, match="gradient of the unrounded step is not finite"):
        measure_noise(MLP(), [vectors()], lambda model, batch: class_loss(model, batch) * float("nan"))
    with pytest.raises(DivergedError, match="is zero on this batch"):
        measure_noise(MLP(), [vectors()], lambda model, batch: class_loss(model, batch) * 0)
    assert issubclass(DivergedError, AssignError)


def test_the_file_is_one_line_per_tensor(tmp_path):
    file = tmp_path / "noise.json"
    found = measure_noise(MLP(), [vectors()], class_loss, file=file)
    assert dataclasses.replace(found) == NoiseTable.load(file)
    data = json.loads(file.read_text())
    assert data["assign_noise"] == 1
    assert len(file.read_text().splitlines()) == len(data["cells"]) + 10


def test_batches_may_differ_in_size():
    for make, batch, sizes, method in (
        (MLP, vectors, (16, 12, 8), "measured"),
        (MLP, vectors, (16, 12, 8), "first-order"),
        (GPT, tokens, (4, 3), "first-order"),
    ):
        batches = [batch(size) for size in sizes]
        found = measure_noise(make(), batches, class_loss, space="bf16", options=NoiseOptions(method=method, rtol=0))
        assert found.batches == len(sizes)
