"""A plan made to run: identity in fp32, marks that really take effect, and everything a user does around a model."""

import copy
import operator
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import all_high, all_low, everything, packed_channels_last, sgd, steps, traced
from models import GPT, MLP, MODELS, Complex, Gated, InPlace, Recurrent, ResNet, class_loss, images, tokens, vectors
from torch import nn
from torch._inductor.custom_graph_pass import get_hash_for_files

import assign
from assign import _torch
from assign.errors import PlanError
from assign.executor import pipeline
from assign.executor.apply import apply, autocast, planned_step
from assign.executor.backends import Backend, identity, make_backend
from assign.executor.compiled_memory import log_passes
from assign.executor.pipeline import source_files
from assign.formats.tables import make_table
from assign.numerics.rounding import quantize
from assign.optim.optimizers import follow
from assign.plan.keys import saved_key
from assign.plan.plan import Assignment, Entry
from assign.plan.recipes import store


def nodes(graphs, target):
    return [node for graph in graphs for node in graph.graph.nodes if node.target is target]


@pytest.mark.parametrize("name", MODELS)
def test_an_all_fp32_plan_is_plain_training_bit_for_bit(name):
    make, data = MODELS[name]
    plain, batch = make(), data()
    planned = copy.deepcopy(plain)
    plan = everything(traced(plain, batch), "fp32")
    losses, grads = steps(plain, lambda b: class_loss(plain, b), batch)
    planned_losses, planned_grads = steps(planned, planned_step(planned, class_loss, plan, backend="eager"), batch)
    assert planned_losses == losses
    for ours, theirs in zip(planned_grads, grads, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for key, value in plain.state_dict().items():
        assert torch.equal(planned.state_dict()[key], value), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", ["native", "hfp8"])
def test_low_plans_stay_near_plain_training(name, recipe):
    make, data = MODELS[name]
    plain, batch = make(), data()
    planned = copy.deepcopy(plain)
    plan = all_high(traced(plain, batch), recipe)
    losses, _ = steps(plain, lambda b: class_loss(plain, b), batch)
    planned_losses, _ = steps(planned, planned_step(planned, class_loss, plan, backend="eager"), batch)
    assert planned_losses == pytest.approx(losses, rel=0.02)  # a few bf16 ulps (2^-8) per tensor


@pytest.mark.parametrize(
    "make",
    [Recurrent, lambda: Recurrent(nn.GRU), lambda: Recurrent(nn.RNN), Complex],
    ids=["lstm", "gru", "rnn", "complex"],
)
@pytest.mark.parametrize("format_name", ["fp32", "bf16"])
def test_recurrent_layers_and_complex_numbers(make, format_name):
    """Layers are unrolled, so that sums have another order; complex numbers stay as they are, in parameters too."""
    plain, batch = make(), vectors()
    planned = copy.deepcopy(plain)
    plan = everything(traced(plain, batch), format_name)
    losses, _ = steps(plain, lambda b: class_loss(plain, b), batch)
    step = planned_step(planned, class_loss, plan, backend="eager")
    planned_losses, _ = steps(planned, step, batch, optimizer=lambda own: follow(sgd(own), planned, plan))
    assert planned_losses == pytest.approx(losses, rel=1e-5 if format_name == "fp32" else 0.02)


def test_the_values_that_cross_are_on_their_grids(graphs):
    model, batch = ResNet(), images(batch=4)
    table = traced(model, batch)
    planned_step(model, class_loss, all_low(table, "hfp8"), backend="eager")(batch).backward()
    forward, backward = graphs
    outputs = next(n for n in forward.graph.nodes if n.op == "output").all_input_nodes
    saved = {n.name: n for n in outputs}
    codes = [n for n in saved.values() if n.target is torch.ops.assign.encode.default]
    assert {n.meta["val"].dtype for n in codes} == {torch.uint8}
    decoded = [n for n in backward.graph.nodes if n.target is torch.ops.assign.decode.default]
    assert len(decoded) == len(codes) > 8
    wide = [n for n in saved.values() if n.meta["val"].dtype == torch.float32 and n.op != "placeholder"]
    largest = max(n.meta["val"].numel() for n in codes)
    assert all(n.meta["val"].numel() < largest / 16 for n in wide)  # statistics and the loss only


def test_every_tensor_is_rounded_to_its_own_format(graphs):
    """Program test: one quantize per tensor and per gradient, in the format that the plan says."""
    model, batch = MLP(), vectors()
    table = traced(model, batch)
    plan = all_low(table, "hfp8")
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    rounded = [
        (_torch.label_of(n), n.args[2], _torch.is_backward(n)) for n in nodes(graphs, torch.ops.assign.quantize.default)
    ]
    for info in table.paper_tensors:
        key, backward = info.key.removesuffix(".grad"), info.key.endswith(".grad")
        if (key == "/input" and backward) or info.need:
            continue  # nobody asks for the gradient of the batch; the loss is in float32
        assert (f"mark:{key}", plan.entries[info.key].format, backward) in rounded, info.key


def test_each_slice_has_its_own_format(graphs):
    model, batch = Gated(), vectors()
    table = traced(model, batch)
    value, gate = ("fp(4,3,4)", "fp(5,2,0)"), ("fp(3,1,0)", "fp(2,2,0)")
    formats = dict(zip(("/slice", "/slice.grad", "/slice#2", "/slice#2.grad"), value + gate, strict=True))
    plan = everything(table, "fp32").replace({key: Entry(name, True) for key, name in formats.items()})
    planned = planned_step(model, class_loss, plan, backend="eager")(batch)
    planned.backward()
    halves = model.fc(batch[0]).detach().chunk(2, 1)
    parts = [quantize(part, name).requires_grad_() for part, name in zip(halves, (value[0], gate[0]), strict=True)]
    loss = nn.functional.cross_entropy(parts[0] * parts[1], batch[1])
    loss.backward()
    assert planned == loss
    grad = torch.cat([quantize(part.grad, name) for part, name in zip(parts, (value[1], gate[1]), strict=True)], 1)
    assert torch.equal(model.fc.weight.grad, grad.T @ batch[0])
    codes = nodes([graphs[0]], torch.ops.assign.encode.default)
    assert [n.meta["val"].shape for n in codes] == [(16, 4), (16, 4)]  # the halves wait, the whole does not


def test_encode_comes_right_behind_the_last_reader(graphs):
    model, batch = ResNet(), images(batch=4)
    planned_step(model, class_loss, all_low(traced(model, batch)), backend="eager")(batch)
    forward = graphs[0]
    order = {node: i for i, node in enumerate(forward.graph.nodes)}
    for code in nodes([forward], torch.ops.assign.encode.default):
        source = code.args[0]
        readers = [user for user in source.users if user is not code and user.op != "output"]
        last = max(order[user] for user in readers)
        between = [n for n in forward.graph.nodes if last < order[n] < order[code]]
        allowed = (torch.ops.assign.encode.default, operator.getitem)  # getitem: further results of that reader
        assert all(n.target in allowed for n in between)


def test_products_run_in_bf16_under_the_native_recipe(graphs):
    model, batch = GPT(), tokens()
    planned_step(model, class_loss, all_low(traced(model, batch)), backend="eager")(batch).backward()
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
    found = [n for graph in graphs for n in graph.graph.nodes if n.target in products]
    assert len(found) > 10
    assert {n.meta["val"].dtype for n in found} == {torch.bfloat16}


def test_products_stay_in_fp32_where_operands_are_not_exact_in_16_bit(graphs):
    model, batch = GPT(), tokens()
    planned_step(model, class_loss, all_high(traced(model, batch), "hfp8"), backend="eager")(batch).backward()
    assert {n.meta["val"].dtype for n in nodes(graphs, torch.ops.aten.mm.default)} == {torch.float32}


def test_weights_are_rounded_again_rather_than_saved(graphs):
    model, batch = MLP(), vectors()
    planned_step(model, class_loss, all_low(traced(model, batch)), backend="eager")(batch).backward()
    rounded = nodes([graphs[1]], torch.ops.assign.scale_quantize.default)
    assert any(_torch.label_of(n) == "mark:second.weight" and n.args[2] is True for n in rounded)


def test_weights_that_inductor_would_copy_wait_in_their_own_format(graphs, monkeypatch):
    """Those of convolutions, but for one pixel: channels-last they lie otherwise, and the copy would wait in fp32."""
    batch = images(batch=4)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    twin = copy.deepcopy(model)
    plan = all_low(traced(model, batch))
    expected = steps(model, planned_step(model, class_loss, plan, backend="eager"), batch, count=2)
    graphs.clear()
    monkeypatch.setattr(pipeline, "JOINT", (packed_channels_last, *pipeline.JOINT[1:]))
    losses, grads = steps(twin, planned_step(twin, class_loss, plan, backend="eager"), batch, count=2)
    assert losses == expected[0]
    for ours, theirs in zip(grads, expected[1], strict=True):
        assert all(map(torch.equal, ours, theirs))
    waiting = {_torch.label_of(n) for n in nodes([graphs[0]], torch.ops.assign.encode.default)}
    again = {_torch.label_of(n) for n in nodes([graphs[1]], torch.ops.assign.scale_quantize.default)}
    assert "mark:0.weight" in waiting - again
    assert "mark:2.weight" in again - waiting


def test_saved_may_be_narrower_than_the_activation(graphs):
    model, batch = ResNet(), images(batch=4)
    table = traced(model, batch)
    key = "layers.0.act/relu"
    plan = everything(table, "bf16").replace({saved_key(key): Entry("e4m3:pow2", True)})
    step = planned_step(model, class_loss, plan, backend="eager")
    step(batch).backward()
    (code,) = nodes([graphs[0]], torch.ops.assign.encode.default)
    assert code.args[2] == "e4m3:pow2"
    assert _torch.label_of(code) == f"mark:{key}"


def test_the_users_module_is_untouched_and_shared():
    model, batch = ResNet(), images()
    names, before = list(model.state_dict()), model(batch[0])
    planned = apply(model, all_low(traced(model, batch)), backend="eager")
    planned.train()
    assert isinstance(planned, ResNet)
    assert list(planned.state_dict()) == names
    assert [n for n, _ in planned.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert next(planned.parameters()) is next(model.parameters())
    low = planned(batch[0])
    assert low.dtype == torch.float32
    assert not torch.equal(low, before)
    model.load_state_dict(planned.state_dict())
    planned.eval()
    assert not model.training
    assert type(model) is ResNet


def test_apply_without_the_loss_trains():
    model, batch = MLP(), vectors()
    planned = apply(model, all_low(traced(model, batch)), backend="eager")
    losses, _ = steps(planned, lambda b: class_loss(planned, b), batch, count=8)
    assert losses[-1] < losses[0]


def test_gradients_accumulate_clip_and_scale():
    model, batch = MLP(), vectors()
    plan = everything(traced(model, batch), "fp32")
    twin = copy.deepcopy(model)
    planned = apply(twin, plan, backend="eager")
    for network in (model, planned):
        for _ in range(2):
            class_loss(network, batch).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.1)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    scaler = torch.amp.GradScaler("cpu")
    optimizer = sgd(twin.parameters())
    before = twin.first.weight.clone()
    scaler.scale(class_loss(planned, batch)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, twin.first.weight)


def test_backward_overflow_becomes_inf_for_the_scaler():
    model, batch = MLP(), vectors()
    planned = planned_step(model, class_loss, all_low(traced(model, batch), "hfp8"), backend="eager")
    (planned(batch) * 1e12).backward()
    assert any(p.grad.isinf().any() or p.grad.isnan().any() for p in model.parameters())


def test_eval_no_grad_and_a_smaller_last_batch():
    model, batch = ResNet(), images(batch=8)
    planned = apply(model, all_low(traced(model, batch)), backend="eager")
    class_loss(planned, batch).backward()
    class_loss(planned, (batch[0][:3], batch[1][:3])).backward()
    planned.eval()
    with torch.no_grad():
        one = planned(batch[0][:1])
    assert one.shape == (1, 4)
    assert torch.equal(one, planned(batch[0][:1]).detach())


def test_the_users_own_casts_stay():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 32)
            self.second = nn.Linear(32, 4)

        def forward(self, x):
            x = self.first(x).to(torch.bfloat16).float()
            return self.second(x.float() * 2)

    model, batch = Casting(), vectors()
    table = traced(model, batch)
    for name in ("fp32", "bf16", "fp16", "e4m3:pow2"):
        twin = copy.deepcopy(model)
        loss = planned_step(twin, class_loss, everything(table, name), backend="eager")(batch)
        loss.backward()
        assert loss.item() == pytest.approx(class_loss(model, batch).item(), rel=0.1)
        if name == "fp32":
            assert loss.item() == class_loss(model, batch).item()


def test_more_batch_sizes_than_dynamo_would_compile():
    model = MLP()
    planned = apply(model, all_low(traced(model, vectors())), backend="eager")
    for size in range(2, 14):
        class_loss(planned, vectors(batch=size)).backward()


def test_two_models_at_once_and_many_in_a_row():
    batch = vectors()
    models = [MLP() for _ in range(10)]  # more than Dynamo compiles of one function
    plans = [everything(traced(model, batch), name) for model, name in zip(models, ["fp32", "bf16"] * 5, strict=True)]
    applied = [apply(model, plan, backend="eager") for model, plan in zip(models, plans, strict=True)]
    for model, planned, plan in zip(models, applied, plans, strict=True):
        same = torch.equal(planned(batch[0]), model(batch[0]))
        assert same == (plan.entries["first.weight"].format == "fp32")


def test_autocast_holds_inside_the_context_only():
    model, batch = MLP(), vectors()
    plan = everything(traced(model, batch), "bf16")
    plain = model(batch[0])
    with autocast(model, plan, backend="eager"):
        inside = model(batch[0])
    assert not torch.equal(inside, plain)
    assert torch.equal(model(batch[0]), plain)
    assert list(model.state_dict()) == list(MLP().state_dict())
    with autocast(model, plan, backend="eager"):
        assert torch.equal(model(batch[0]), inside)
    with pytest.raises(ValueError, match="mine"), autocast(model, plan, backend="eager"):
        raise ValueError("mine")
    assert type(model) is MLP


def test_autocast_of_a_copy_trains_the_copy():
    model, batch = MLP(), vectors()
    plan = everything(traced(model, batch), "bf16")
    with autocast(model, plan, backend="eager"):
        model(batch[0])
    twin = copy.deepcopy(model)
    with autocast(twin, plan, backend="eager"):
        class_loss(twin, batch).backward()
    assert twin.first.weight.grad is not None
    assert model.first.weight.grad is None


def test_copies_and_pickles_keep_the_plan():
    model, batch = MLP(), vectors()
    planned = apply(model, everything(traced(model, batch), "bf16"), backend="eager")
    twin = copy.deepcopy(planned)
    with torch.no_grad():
        planned.first.weight.zero_()
    assert twin.first.weight.abs().sum() > 0
    assert not torch.equal(twin(batch[0]), planned(batch[0]))
    again = pickle.loads(pickle.dumps(planned))
    assert torch.equal(again(batch[0]), planned(batch[0]))


def test_a_plan_of_another_model_names_the_nearest_keys():
    batch = vectors()
    plan = everything(traced(MLP(), batch), "bf16")
    with pytest.raises(PlanError) as caught:
        apply(InPlace(), plan)
    assert "belongs to another model" in str(caught.value)
    assert "'first.bias'" in str(caught.value)

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 32)
            self.second = nn.Linear(32, 4)

        def forward(self, x):
            return self.second(torch.sigmoid(self.first(x)))

    with pytest.raises(PlanError, match=r"(?s)no entry for 2 .*'/sigmoid'.*nearest in the plan: '/tanh"):
        planned_step(Renamed(), class_loss, plan, backend="eager")(batch)


def test_unknown_backend():
    model, batch = MLP(), vectors()
    plan = everything(traced(model, batch), "bf16")
    with pytest.raises(PlanError, match=r"backend 'inductr' is not known, did you mean 'inductor'"):
        apply(model, plan, backend="inductr")


@pytest.mark.slow
def test_inductor_computes_what_eager_computes():
    """Compiled kernels sum in another order: near, not equal; the saved codes take the same bytes."""
    make, data = MODELS["resnet"]
    model, batch = make(), data()
    for plan in (all_low(traced(model, batch)), everything(traced(model, batch), "fp32")):
        twins = [copy.deepcopy(model) for _ in range(2)]
        results = [
            steps(twin, planned_step(twin, class_loss, plan, backend=backend), batch, count=2)
            for twin, backend in zip(twins, ("eager", "inductor"), strict=True)
        ]
        assert results[1][0] == pytest.approx(results[0][0], rel=0.02)


# ---- what is stored between steps


def stored_plan(model, batch, format_name="bf16", **formats):
    table = traced(model, batch)
    return everything(table, format_name).replace(store(table, **formats))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("formats", [{"master": "bf16"}, {"gradients": "bf16"}], ids=["masters", "gradients"])
def test_what_is_narrow_already_is_stored_narrow_without_loss(name, formats):
    """A bf16 weight on a bf16 master, and a bf16 gradient stored so, are what they were on fp32 ones."""
    make, data = MODELS[name]
    model, batch = make(), data()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    twin = copy.deepcopy(model)
    wide = planned_step(model, class_loss, stored_plan(model, batch), backend="eager")
    narrow = planned_step(twin, class_loss, stored_plan(twin, batch, **formats), backend="eager")
    results = []
    for step in (wide, narrow):
        torch.manual_seed(1)
        loss = step(batch)
        loss.backward()
        results.append(loss)
    assert torch.equal(*results)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert (mine.dtype, mine.grad.dtype) == (
            torch.bfloat16 if "master" in formats else torch.float32,
            torch.bfloat16,
        )
        assert torch.equal(mine.grad.float(), theirs.grad)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("name", "formats"), [("fp16", {"master": "fp16", "gradients": "fp32"}), ("bf16", {"gradients": "bf16"})]
)
def test_stored_dtypes_hold_on_both_backends(backend, name, formats):
    make, data = MODELS["mlp"]
    model, batch = make(), data()
    step = planned_step(model, class_loss, stored_plan(model, batch, name, **formats), backend=backend)
    optimizer = sgd(model.parameters())
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = step(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    wanted = (torch.float16, torch.float32) if "master" in formats else (torch.float32, torch.bfloat16)
    assert {(p.dtype, p.grad.dtype) for p in model.parameters()} == {wanted}
    assert losses[-1] < 0.9 * losses[0]


def test_a_narrow_master_is_widened_for_a_wide_weight():
    make, data = MODELS["resnet"]
    model, batch = make(), data()
    plan = stored_plan(model, batch, "fp32", master="bf16", gradients="fp32")
    twin = copy.deepcopy(model)
    planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(parameter.bfloat16())
    class_loss(twin, batch).backward()
    for mine, plain in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, plain.grad)  # in float32, not by way of the master's dtype


def test_gradients_are_narrow_from_the_mark_on(graphs):
    """Not only behind the backward pass, where autograd itself would convert them."""
    model, batch = MODELS["resnet"][0](), MODELS["resnet"][1]()
    planned_step(model, class_loss, stored_plan(model, batch, "fp32", gradients="bf16"), backend="eager")(
        batch
    ).backward()
    outputs = next(node for node in graphs[-1].graph.nodes if node.op == "output").all_input_nodes
    dtypes = [_torch.joint_value(node).dtype for node in outputs]
    assert dtypes == [torch.bfloat16] * len([*model.parameters()])


def test_a_master_of_16_bit_is_the_weight_itself(graphs):
    """No copy of a parameter is made to compute with, nor one of its gradient to store."""
    model, batch = MODELS["mlp"][0](), MODELS["mlp"][1]()
    planned_step(model, class_loss, stored_plan(model, batch, master="bf16"), backend="eager")(batch).backward()
    shapes = {tuple(p.shape) for p in model.parameters()}
    conversions = [torch.ops.aten._to_copy.default, torch.ops.assign.quantize.default]
    made = [n for graph in graphs for n in graph.graph.nodes if n.target in conversions]
    assert not [n for n in made if tuple(_torch.joint_value(n).shape) in shapes]


def test_apply_stores_parameters_and_says_so_in_the_state_dict():
    model, batch = MODELS["dropout"][0](), MODELS["dropout"][1]()
    plan = stored_plan(model, batch, master="bf16")
    model(batch[0]).sum().backward()
    planned = apply(model, plan, backend="eager")
    assert {value.dtype for value in planned.state_dict().values()} == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    assert planned(batch[0]).dtype == torch.float32
    twin = copy.deepcopy(planned)
    assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
    model.eval()
    with torch.no_grad():
        assert torch.equal(planned(batch[0]), twin.eval()(batch[0]))
    assert apply(model, plan, backend="eager")(batch[0]).dtype == torch.float32  # a second time
    without = apply(model, stored_plan(MODELS["dropout"][0](), batch), backend="eager")
    assert without(batch[0]).dtype == torch.float32  # the user's code is one for float32 weights still
    assert {p.dtype for p in without.parameters()} == {torch.bfloat16}  # and nothing says that they are to change


def test_frozen_parameters_have_masters_and_no_gradients():
    model, batch = MODELS["mlp"][0](), MODELS["mlp"][1]()
    model.first.weight.requires_grad_(False)
    step = planned_step(model, class_loss, stored_plan(model, batch, master="bf16"), backend="eager")
    step(batch).backward()
    assert model.first.weight.dtype == torch.bfloat16
    assert model.first.weight.grad is None
    assert model.second.weight.grad.dtype == torch.bfloat16


def test_gradients_of_another_dtype_add_up_over_batches():
    model, batch = MODELS["mlp"][0](), MODELS["mlp"][1]()
    step = planned_step(model, class_loss, stored_plan(model, batch, "fp32", gradients="bf16"), backend="eager")
    step(batch).backward()
    once = [p.grad.clone() for p in model.parameters()]
    smaller = tuple(each[:4] for each in batch)  # captured anew, beside the gradients
    step(smaller)
    step(batch).backward()
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        assert parameter.grad.dtype == torch.bfloat16
        assert torch.equal(parameter.grad, gradient * 2)


def test_hooks_run_once_in_each_forward_pass_whenever_they_are_registered():
    model, batch = MLP(), vectors()
    planned = apply(model, everything(traced(model, batch), "bf16"), backend="eager")
    seen = []
    planned(batch[0])
    handles = [
        model.register_forward_pre_hook(lambda *_: seen.append("before")),
        model.first.register_forward_hook(lambda *_: seen.append("inside")),
        planned.register_forward_hook(lambda *_: seen.append("behind")),
    ]
    for _ in range(2):
        planned(batch[0])
    assert seen == ["before", "inside", "behind"] * 2
    for handle in handles:
        handle.remove()
    planned(batch[0])
    assert len(seen) == 6


def test_the_compiler_caches_by_the_passes_that_are_there(monkeypatch):
    """A file that moves must not fall out of the key of Inductor's cache: a changed pass would run as it was."""
    taken = {}
    monkeypatch.setattr(_torch, "inductor_backend", lambda *_, passes, **__: taken.update(passes=passes))
    plan = Assignment(entries={"/input": Entry("bf16", low=False)}, recipe="native", fingerprint="")
    make_backend(plan, Backend.INDUCTOR)
    assert all(path.is_file() for path in taken["passes"])
    named = {f"{path.parent.name}/{path.stem}" for path in taken["passes"]}
    assert {"passes/pack", "numerics/kernels", "plan/compute_dtype", "tracing/joint", "assign/_torch"} <= named


def test_the_key_of_the_compilers_cache_holds_every_file_that_can_change_a_graph(tmp_path):
    """Each module that the backends import is in it, so an edit of any of them in a copy gives another key."""
    code = "import sys, assign.executor.apply; print(*(m for m in sys.modules if m.split('.')[0] == 'assign'))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    package = Path(assign.__file__).parent
    copied = tmp_path / "assign"
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    names = {str(path.relative_to(tmp_path).with_suffix("")).replace("/", ".") for path in source_files(copied)}
    assert {name.removesuffix(".__init__") for name in names} >= set(imported)

    def key():
        get_hash_for_files.cache_clear()  # it remembers files by name
        return get_hash_for_files(tuple(map(str, source_files(copied))), extra="entries")

    before = key()
    for edited in ("plan/compute_dtype.py", "plan/ops.py", "executor/passes/pack.py", "tracing/tensor_sites.py"):
        (copied / edited).write_text((copied / edited).read_text() + "\n# edited\n")
        assert key() != before
        before = key()


def test_the_key_of_the_compilers_cache_holds_the_definition_of_a_format_from_outside():
    fmt = assign.register_format("halves5", bits=5, decode=lambda code: (code - 32 * (code > 15)) / 2)
    plan = Assignment(entries={"/input": Entry("halves5", low=True)}, recipe="native", fingerprint="")
    assert f"halves5 is {fmt.layout.fingerprint}" in identity(plan).splitlines()
    other = make_table("halves5", 5, lambda code: (code - 32 * (code > 15)) / 4, None, False)
    assert other.fingerprint != fmt.layout.fingerprint
    assert "is" not in identity(plan.replace({"/input": Entry("bf16", low=False)}))


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_log_says_what_each_pass_changed(backend):
    """Tensors are marked, saved activations are encoded, and scale and rounding become one operator."""
    torch.manual_seed(0)
    model, batch = MLP(), vectors()
    plan = all_low(traced(model, batch))
    changes = log_passes(model, batch, class_loss, plan, backend=Backend(backend))
    of = {(each.graph, each.name): each for each in changes}
    assert of["captured", "mark"].added["mark_tensor"] >= 4
    assert of["joint", "pack"].added["assign.encode.default"] >= 1
    fused = of["forward", "fuse_scales"]
    assert fused.added["assign.scale_quantize.default"] == fused.removed["assign.scale.default"] >= 1
    assert (("joint", "reuse_grids") in of) == (("lowered", "overwrite") in of) == (backend == "inductor")
    assert "fuse_scales" in str(fused)
    assert "+" in str(fused)
    untouched = log_passes(model, batch, class_loss, everything(traced(model, batch), "fp32"))
    assert not any(each.added or each.removed for each in untouched)


def test_a_planned_step_logs_its_passes():
    model, batch, found = MLP(), vectors(), []
    plan = all_low(traced(model, batch))
    planned_step(model, class_loss, plan, backend="eager", log_passes=found.append)(batch)
    apply(model, plan, backend="eager", log_passes=found.append)(batch[0])
    assert [each.name for each in found].count("mark") == 2


def test_kernels_that_lay_results_out_otherwise_than_without_data():
    """The backward pass of softplus keeps the strides of its input on a real tensor and not on one without data."""

    class Softplus(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.scale = nn.Linear(16, 2), nn.Parameter(torch.ones(2))
            self.weight = nn.Parameter(torch.randn(4, 2, 4))

        def forward(self, x):
            h = torch.exp(self.scale * F.softplus(self.f(x.view(4, 4, 16)))).transpose(-1, -2)
            return (h * self.weight).reshape(8, 4).repeat(2, 1)

    model, batch = Softplus(), vectors()
    plan, plain = everything(traced(model, batch), "fp32"), copy.deepcopy(model)
    class_loss(plain, batch).backward()
    assign.planned_step(model, class_loss, plan, backend="eager")(batch).backward()
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)
