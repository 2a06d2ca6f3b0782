"""The table against what is known of the model, and the errors a user meets."""

import dataclasses
import importlib
import json
from concurrent.futures import ThreadPoolExecutor

import networkx
import pytest
import torch
import torch.nn.functional as F
from helpers import adamw, measured_peak, sgd, traced
from models import GPT, MLP, MODELS, InPlace, ResNet, class_loss, images, tokens, vectors
from torch import nn

from assign.errors import PlanError, TraceError
from assign.memory.estimate import estimate
from assign.plan.space import SearchSpace
from assign.plan.table import Role, TensorTable
from assign.planner import search_table
from assign.tracing.tracer import trace


def keys(table, role=Role.ACTIVATION):
    return [info.key for info in table.tensors if info.role is role]


def test_keys_of_a_resnet():
    table = traced(ResNet(blocks=1), images())
    assert keys(table) == [
        "/input",
        "stem/conv2d",
        "bn/batch_norm",
        "/relu",
        "layers.0.conv1/conv2d",
        "layers.0.bn1/batch_norm",
        "layers.0.act/relu",
        "layers.0.conv2/conv2d",
        "layers.0.bn2/batch_norm",
        "layers.0/add",
        "layers.0.act/relu#2",
        "/mean",
        "head/linear",
        "loss/log_softmax",
        "loss/nll_loss",
    ]
    assert set(keys(table, Role.WEIGHT)) == {name for name, _ in ResNet(blocks=1).named_parameters()}
    assert set(keys(table, Role.WEIGHT_GRAD)) == {f"{name}.grad" for name, _ in ResNet(blocks=1).named_parameters()}


def test_a_row_says_what_it_is():
    table = traced(ResNet(blocks=1), images(batch=8, size=8))
    row = table.by_key["layers.0/add"]
    assert (row.shape, row.elements, row.dtype, row.op) == ((8, 8, 8, 8), 4096, "float32", "add")
    assert row.module == "layers.0"
    assert row.source.startswith("tests/models.py:")
    assert row.inputs == ("layers.0.bn2/batch_norm", "/relu")
    assert row.consumers == ("layers.0.act/relu#2",)
    assert table.by_key["loss/nll_loss"].elements == 8  # one per sample


def test_saved_are_the_values_that_the_backward_pass_reads():
    saved = set(keys(traced(ResNet(blocks=1), images()), Role.SAVED))
    assert "layers.0.act/relu.saved" in saved
    assert "layers.0.conv1/conv2d.saved" in saved
    assert "layers.0.bn1/batch_norm.saved" not in saved  # relu's backward reads relu's output
    assert "loss/nll_loss.saved" not in saved


def test_tied_weights_have_one_key():
    table = traced(GPT(), tokens())
    assert keys(table, Role.WEIGHT).count("tokens.weight") == 1
    assert "head.weight" not in table.by_key
    assert set(table.by_key["tokens.weight"].consumers) == {"tokens/embedding", "head/linear"}


def test_views_and_constants_are_no_tensors():
    names = keys(traced(GPT(), tokens()))
    assert not [
        name
        for name in names
        if name.rpartition("/")[2].split("#")[0] in ("view", "split", "transpose", "reshape", "arange")
    ]


class Packed(nn.Module):
    """Three tensors in one, as attention packs them, and a copy that only moves data."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 48)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        q, k, v = self.fc(x).view(-1, 3, 4, 4).permute(1, 0, 2, 3).unbind(0)
        return self.head((q * k + v).transpose(1, 2).contiguous().flatten(1))


def test_moves_are_no_tensors_and_gradients_of_views_follow_theirs():
    table = traced(Packed(), vectors())
    slices = ["/slice", "/slice#2", "/slice#3"]
    assert keys(table)[:7] == ["/input", "fc/linear", *slices, "/mul", "/add"]
    events = [event for event in table.schedule.events if event.backward and not event.op]
    written = [table.schedule.buffers[b] for event in events for b in event.writes]
    assert written
    assert all(buffer.holds.endswith(".grad") for buffer in written if buffer.elements > 1)


class Sliced(nn.Module):
    """Parts of an activation, all of it, parts of a part; of a parameter; and one that is written into."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.gains = nn.Parameter(torch.ones(2, 4))

    def forward(self, x):
        first = x[:, 0]
        first.add_(1)  # changes the batch
        left, right = self.fc(x).relu().chunk(2, 1)
        all_of_it, last = left[:, :4].view(-1, 2, 2), right.narrow(1, 2, 2).select(1, 1)
        return all_of_it.flatten(1) * self.gains[0] + (last * first)[:, None]


def test_slices_are_tensors():
    table = traced(Sliced(), vectors())
    rows = {key: table.by_key[key] for key in keys(table) if "slice" in key}
    assert [row.shape for row in rows.values()] == [(16, 4), (16, 4), (16, 2), (16,)]  # left, right, narrow, select
    made_of = ["/relu", "/relu", "/slice#2", "/slice#3"]
    assert [row.inputs for row in rows.values()] == [(source,) for source in made_of]
    assert table.by_key["/mul"].inputs == ("/slice", "gains")
    assert table.by_key["/mul#2"].inputs == ("/slice#4", "/input")
    assert {f"{key}.grad" for key in rows} <= table.by_key.keys()
    assert {row.group for row in rows.values()} == {table.by_key["fc/linear"].group}


def test_in_place_writes_are_named_where_they_are_done():
    table = traced(InPlace(), vectors(width=8))
    assert table.by_key["/setitem#3"].inputs == ("/mul#3",)
    assert table.by_key["/gelu"].inputs == ("b/linear",)  # inside a checkpointed block


def test_optimizer_states_are_rows():
    table = trace(MLP(), vectors(), class_loss, torch.optim.AdamW)
    assert keys(table, Role.OPTIM_STATE)[:2] == ["first.weight.optim.exp_avg", "first.weight.optim.exp_avg_sq"]
    weights = sum(p.numel() for p in MLP().parameters())
    assert table.schedule.optimizer_bytes == 2 * 4 * weights


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_optimizer_has_the_same_states_and_no_scratch(kind):
    """Its step cannot run on tensors without data; what it keeps can be said all the same, and what it needs."""
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    model = nn.Sequential(nn.Linear(8, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 4))
    batch = torch.randn(8, 8), torch.randint(4, (8,))
    plain, fused = (
        trace(model, batch, class_loss, lambda p, fused=fused: kind(p, lr=0.1, fused=fused, **more))
        for fused in (False, True)
    )
    assert fused.tensors == plain.tensors
    assert fused.schedule.optimizer_bytes == plain.schedule.optimizer_bytes
    assert fused.schedule.optimizer_scratch_bytes == 0
    assert (plain.schedule.optimizer_scratch_bytes > 0) == (kind is torch.optim.AdamW)
    optimizer = kind(model.parameters(), lr=0.1, fused=True, **more)
    measured = measured_peak(model, batch, lambda batch: class_loss(model, batch), optimizer)
    plan = search_table(fused, strategy="uniform", space=SearchSpace(formats="fp32"))
    assert estimate(fused, plan).peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("wrap", [tuple, lambda pair: {"x": pair[0], "y": pair[1]}, lambda pair: [{"z": pair}]])
def test_batches_of_any_shape(wrap):
    def loss(model, batch):
        while not isinstance(batch, tuple):
            batch = batch[0]["z"] if isinstance(batch, list) else tuple(batch.values())
        return class_loss(model, batch)

    assert keys(trace(MLP(), wrap(vectors()), loss)) == keys(traced(MLP(), vectors()))


def test_same_table_at_another_batch_size():
    small, large = traced(ResNet(), images(batch=4)), traced(ResNet(), images(batch=12))
    assert small.fingerprint == large.fingerprint
    assert list(small.by_key) == list(large.by_key)


def test_the_fingerprint_knows_the_model():
    assert traced(ResNet(blocks=1), images()).fingerprint != traced(ResNet(blocks=2), images()).fingerprint
    assert traced(MLP(width=32), vectors()).fingerprint != traced(MLP(width=64), vectors()).fingerprint


def test_json_round_trip_and_fixed_fields():
    table = traced(GPT(), tokens())
    data = json.loads(json.dumps(table.to_json()))
    assert TensorTable.from_json(data) == table
    assert {"fingerprint", "elements", "groups", "tensors"} <= data.keys()
    assert data["elements"] == sum(group["elements"] for group in data["groups"])
    assert {"key", "role", "shape", "elements", "group", "op"} <= data["tensors"][0].keys()
    with pytest.raises(PlanError, match="not a valid tensor table"):
        TensorTable.from_json({"tensors": []})


def test_a_table_comes_back_from_its_file(tmp_path):
    table = traced(MLP(), vectors())
    table.save(tmp_path / "table.json")
    assert TensorTable.load(tmp_path / "table.json") == table
    assert [each.name for each in tmp_path.iterdir()] == ["table.json"]
    (tmp_path / "half.json").write_text((tmp_path / "table.json").read_text()[:-9])
    for name, message in (
        ("half.json", "half.json is not JSON"),
        ("none.json", "there is no tensor table .*none.json"),
    ):
        with pytest.raises(PlanError, match=message):
            TensorTable.load(tmp_path / name)
    with pytest.raises(PlanError, match="cannot write the tensor table"):
        table.save(tmp_path / "nowhere" / "table.json")


def test_networkx_graph_is_the_forward_pass():
    graph = traced(ResNet(blocks=1), images()).to_networkx()
    assert networkx.is_directed_acyclic_graph(graph)
    assert set(graph.predecessors("layers.0/add")) == {"layers.0.bn2/batch_norm", "/relu"}
    assert graph.nodes["stem.weight"]["role"] == "weight"


def test_nothing_is_computed():
    model = ResNet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    traced(model, images())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        if self.fc(x).sum() > 0:
            return self.fc(x)
        return self.fc(-x)


def on_meta(model, batch):
    """Without data, what a branch looks at is not known."""
    return model.to("meta"), tuple(x.to("meta") for x in batch)


def test_a_graph_break_names_the_users_line():
    with pytest.raises(TraceError) as caught:
        traced(*on_meta(Broken(), vectors()))
    text = str(caught.value)
    assert "test_tracer.py" in text
    assert "if self.fc(x).sum() > 0" in text
    assert "cannot be captured as one graph" in text


def test_what_cannot_be_prepared_names_the_users_line():
    class PerSample(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 4)

        def forward(self, x):
            return torch.func.vmap(lambda row: row.clone().add_(1))(self.fc(x))

    with pytest.raises(TraceError, match=r"cannot be prepared: NotImplementedError.*\n.*test_tracer\.py.*vmap"):
        traced(*on_meta(PerSample(), vectors()))


def test_a_graph_break_in_a_package_names_its_line_too(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "theirs.py").write_text("def gate(x):\n    return x if x.sum() > 0 else -x\n")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    theirs = importlib.import_module("theirs")
    with pytest.raises(TraceError, match=r"at: .*test_tracer.*\n  in: .*theirs\.py.*line 2.*x\.sum\(\) > 0"):
        trace(*on_meta(MLP(), vectors()), lambda model, batch: theirs.gate(model(batch[0])).sum())


def test_other_errors_say_what_to_do():
    with pytest.raises(TraceError, match=r"shape \(16, 4\).*Reduce it with \.mean\(\)"):
        trace(MLP(), vectors(), lambda model, batch: model(batch[0]))
    with pytest.raises(TraceError, match=r"is a function, a torch\.nn\.Module is needed"):
        traced(class_loss, vectors())
    with pytest.raises(TraceError, match="requires a gradient"):
        traced(MLP().requires_grad_(False), vectors())


def test_frozen_weights_have_no_gradient():
    model = MLP()
    model.first.requires_grad_(False)
    table = traced(model, vectors())
    assert "first.weight" in table.by_key
    assert "first.weight.grad" not in table.by_key
    assert "second.weight.grad" in table.by_key


def test_the_loss_may_hold_targets_that_are_floats():
    table = trace(MLP(), (torch.randn(4, 16), torch.randn(4, 4)), lambda m, b: F.mse_loss(m(b[0]), b[1]), sgd)
    assert [name for name in keys(table) if "input" in name] == ["/input"]
    assert keys(table)[-1] == "loss/mse_loss"


def test_a_table_of_an_earlier_version_has_the_scratch_it_had():
    """It gave two numbers: for float32, and for both 16-bit dtypes."""
    data = traced(ResNet(), images()).to_json()
    number = next(n for n, event in enumerate(data["schedule"]["events"]) if event["scratch"])
    data["schedule"]["events"][number]["scratch"] = [400, 200]
    event = TensorTable.from_json(data).schedule.events[number]
    assert [event.scratch_in(dtype) for dtype in ("float32", "bfloat16", "float16")] == [400, 200, 200]


@pytest.mark.parametrize("name", ["mlp", "resnet", "own function", "explicit dtypes"])
def test_a_model_on_the_meta_device_has_the_tensors_that_it_has_elsewhere(name):
    """Backward pass and saved activations too; scratch memory of kernels is measured on a CPU alone.

    Not models with attention, for which a CPU has a kernel that saves less than the operators that it is made of.
    """
    make, make_batch = MODELS[name]
    here = traced(make(), make_batch(), optimizer=adamw)
    with torch.device("meta"):
        there = traced(make(), make_batch(), optimizer=adamw)
    assert there.tensors == here.tensors
    assert there.schedule.buffers == here.schedule.buffers
    assert there.schedule.kept == here.schedule.kept
    plain = [[dataclasses.replace(each, scratch=()) for each in table.schedule.events] for table in (there, here)]
    assert plain[0] == plain[1]


def test_threads_trace_models_on_the_meta_device_at_once():
    """Each has the whole backward pass, whoever ends first, and torch's operators are as before."""
    operator = torch.ops.aten.nll_loss.default
    before = dict(operator.py_kernels)
    expected = traced(MLP(), vectors()).schedule.kept

    def call(_number):
        with torch.device("meta"):
            return traced(MLP(), vectors()).schedule.kept

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(call, range(6))) == [expected] * 6
    assert operator.py_kernels == before
