"""Two processes, gloo, one model: DDP and FSDP2 around a planned model, promotion, optimizers, refusals.

The processes are started once; each test sends both of them a function of this module, called with the rank.
"""

import contextlib
import functools
import io
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import all_low, everything, traced
from models import GPT, MLP, ResNet, class_loss, images, tokens, vectors
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

import assign
from assign import distributed
from assign.errors import PlanError, TaskError
from assign.optim import updates
from assign.plan.recipes import store
from assign.training.loop import train

SECONDS = 100


def serve(rank, path, pipe):
    """Call what comes through the pipe, with the rank; send back what it returns or raises."""
    torch.set_num_threads(1)
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS))
    while (call := pipe.recv()) is not None:
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            answer = call(rank)
        except Exception as error:
            answer = error
        data = io.BytesIO()
        torch.save(answer, data)
        pipe.send(data.getvalue())
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """``both(function, …)``: what ``function(rank, …)`` returns in each of two processes; raises what either raised."""
    context = mp.get_context("spawn")
    pipes, processes = [], []
    path = str(tmp_path_factory.mktemp("group") / "store")
    for rank in range(2):
        ours, theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, path, theirs), daemon=True))
        pipes.append(ours)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for process in processes:
            process.start()

    def call(function, *args, **kwargs):
        for pipe in pipes:
            pipe.send(functools.partial(_called, function, args, kwargs))
        assert all(pipe.poll(SECONDS) for pipe in pipes), "a process does not answer"
        answers = [torch.load(io.BytesIO(pipe.recv()), weights_only=False) for pipe in pipes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    yield call
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send(None)
    for process in processes:
        process.join(10)
        process.terminate()


def _called(function, args, kwargs, rank):
    return function(rank, *args, **kwargs)


MODELS = {"mlp": (MLP, vectors), "resnet": (ResNet, images), "gpt": (GPT, tokens)}


@functools.cache
def plan_of(name, kind, **stored):
    """A plan, the same in every process."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    table = traced(make(), batch())
    plan = all_low(table, kind) if kind in ("native", "hfp8") else everything(table, kind)
    return plan.replace(store(table, **stored)) if stored else plan


def made(name):
    torch.manual_seed(0)
    return MODELS[name][0]()


def batches(name, rank, count=3):
    """This process's own batches."""
    torch.manual_seed(10 + rank)
    return [MODELS[name][1]() for _ in range(count)]


def trained(model, optimizer, data, accumulate=None):
    """Parameters and buffers after a step per batch; with ``accumulate``, the gradient of one more before each step.

    Whatever is sharded is given whole.
    """
    for batch in data:
        optimizer.zero_grad()
        if accumulate is not None:
            with accumulate():
                class_loss(model, tuple(part.flip(0) for part in batch)).backward()
        class_loss(model, batch).backward()
        optimizer.step()
    return tensors(model)


def tensors(model):
    inner = distributed.unwrapped(model)
    found = [p.full_tensor() if isinstance(p, DTensor) else p for p in inner.parameters()]
    return [tensor.detach().clone() for tensor in [*found, *inner.buffers()]]


def parameters_in(found, model):
    """What of :func:`tensors` are parameters; buffers are given to all processes only before the next forward pass."""
    return found[: len(list(model.parameters()))]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def momentum(model, plan=None):
    if plan is None:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return assign.optimizer(torch.optim.SGD, model, plan, lr=0.05, momentum=0.9)


# ---- DDP


def ddp_trained(rank, name, kind, backend="eager"):
    plan = plan_of(name, kind)
    planned = assign.apply(made(name), plan, backend=backend)
    ddp = DDP(planned, bucket_cap_mb=0.001)  # several buckets, at which Dynamo would cut the graph
    return parameters_in(trained(ddp, momentum(ddp, plan), batches(name, rank)), planned)


@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [
        ("mlp", "hfp8", "eager"),
        ("resnet", "native", "eager"),
        ("gpt", "bf16", "eager"),
        ("mlp", "e5m2:sr", "eager"),  # each process rounds by chance of its own
        pytest.param("mlp", "native", "inductor", marks=pytest.mark.slow),
    ],
)
def test_ddp_has_the_same_parameters_in_every_process(both, name, kind, backend):
    first, second = both(ddp_trained, name, kind, backend)
    assert same(first, second)
    assert all(tensor.isfinite().all() for tensor in first)
    assert not any(map(torch.equal, first, tensors(made(name))))


def ddp_gradients(rank):
    plan, halves = plan_of("mlp", "native"), [batches("mlp", half, 1)[0] for half in range(2)]
    ddp = DDP(assign.apply(made("mlp"), plan, backend="eager"))
    class_loss(ddp, halves[rank]).backward()
    alone = []
    for half in halves:
        planned = assign.apply(made("mlp"), plan, backend="eager")
        class_loss(planned, half).backward()
        alone.append([p.grad for p in planned.parameters()])
    return [p.grad for p in ddp.parameters()], [(a + b) / 2 for a, b in zip(*alone, strict=True)]


def test_ddp_gradients_are_the_mean_of_what_each_half_gives_alone(both):
    for gradients, means in both(ddp_gradients):
        assert same(gradients, means)  # halving is exact, and adding two numbers has one order


def joined(rank):
    plan, halves = plan_of("gpt", "fp32"), [batches("gpt", half) for half in range(2)]
    ddp = DDP(assign.apply(made("gpt"), plan, backend="eager"))
    two = trained(ddp, momentum(ddp), halves[rank])
    one = assign.apply(made("gpt"), plan, backend="eager")
    whole = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in zip(*halves, strict=True)]
    return two, trained(one, momentum(one), whole)


def test_ddp_is_one_process_on_the_joined_batch(both):
    for two, one in both(joined):
        for a, b in zip(two, one, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # sums in another order, three steps of 0.05


def ddp_plain(rank, name):
    found = []
    for apply in (lambda model: assign.apply(model, plan_of(name, "fp32"), backend="eager"), lambda model: model):
        ddp = DDP(apply(made(name)))
        found.append(trained(ddp, momentum(ddp), batches(name, rank), accumulate=ddp.no_sync))
    return found


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_an_fp32_plan_is_plain_ddp(both, name):
    for planned, plain in both(ddp_plain, name):
        assert same(planned, plain)


def narrow_gradients(rank, accumulate):
    plan = plan_of("resnet", "bf16", gradients="bf16")
    planned = assign.apply(made("resnet"), plan, backend="eager")
    ddp = assign.distributed.data_parallel(planned)
    found = trained(ddp, momentum(ddp, plan), batches("resnet", rank), accumulate=ddp.no_sync if accumulate else None)
    return parameters_in(found, planned), [p.grad for p in ddp.parameters()]


@pytest.mark.parametrize("accumulate", [False, True])
def test_ddp_with_gradients_stored_in_16_bit(both, accumulate):
    (first, gradients), (second, others) = both(narrow_gradients, accumulate)
    assert {gradient.dtype for gradient in gradients} == {torch.bfloat16}
    assert same(gradients, others)
    assert same(first, second)
    assert not any(map(torch.equal, first, tensors(made("resnet"))))


def buffers(rank):
    planned = assign.apply(made("resnet"), plan_of("resnet", "bf16", gradients="bf16"), backend="eager")
    ddp = assign.distributed.data_parallel(planned)
    planned.get_buffer("bn.running_mean").fill_(float(rank))
    with torch.no_grad():
        ddp.eval()(images()[0])
    return planned.get_buffer("bn.running_mean")


def test_ddp_without_buckets_still_gives_buffers_to_all(both):
    assert all(not mean.any() for mean in both(buffers))


# ---- FSDP2


def sharded(model, by_block, **options):
    """A model that is sharded as a whole; block by block, too; or so, and not kept whole behind the forward pass."""
    if by_block == "resharding":
        options["reshard_after_forward"] = True
    if by_block:
        for block in model.blocks:
            fully_shard(block, **options)
    return fully_shard(model, **options)


def fsdp_model(plan, by_block, apply_first):
    """A planned model, sharded; a plain one without a plan."""
    model = made("gpt")
    if plan is None:
        return sharded(model, by_block)
    if apply_first:
        return sharded(assign.apply(model, plan, backend="eager"), by_block)
    return assign.apply(sharded(model, by_block), plan, backend="eager")


@contextlib.contextmanager
def unsynchronised(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def fsdp_plain(rank, by_block, apply_first):
    found = []
    for plan in (plan_of("gpt", "fp32"), None):
        model = fsdp_model(plan, by_block, apply_first)
        optimizer = momentum(model)
        first = trained(model, optimizer, batches("gpt", rank), accumulate=functools.partial(unsynchronised, model))
        with torch.no_grad():
            model(batches("gpt", rank)[0][0])
        assert all(isinstance(p, DTensor) for block in model.blocks for p in block.parameters()) or not by_block
        found.append([*first, *trained(model, optimizer, batches("gpt", rank))])
    return found


@pytest.mark.parametrize(
    ("by_block", "apply_first"), [(False, True), (False, False), (True, True), (True, False), ("resharding", True)]
)
def test_an_fp32_plan_is_plain_fsdp(both, by_block, apply_first):
    (first, plain), (second, _) = both(fsdp_plain, by_block, apply_first)
    assert same(first, plain)
    assert same(first, second)


def fsdp_and_ddp(rank, **stored):
    plan = plan_of("gpt", "native", **stored)
    found = []
    for model in (fsdp_model(plan, by_block=True, apply_first=True), ddp_model(plan)):
        optimizer = momentum(model, plan)
        class_loss(model, batches("gpt", rank)[0]).backward()
        gradients = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
        optimizer.step()
        found.append((gradients, tensors(model)))
    return found


def ddp_model(plan):
    return DDP(assign.apply(made("gpt"), plan, backend="eager"))


@pytest.mark.slow
@pytest.mark.parametrize("stored", [{}, {"master": "bf16"}, {"states": "bf16"}])
def test_fsdp_is_ddp_under_a_plan(both, stored):
    (fsdp, ddp), (other, _) = both(fsdp_and_ddp, **stored)
    assert same(fsdp[0], ddp[0])
    assert same(fsdp[1], other[1])
    for a, b in zip(fsdp[1], ddp[1], strict=True):  # torch's SGD rounds the ends of a tensor unlike its middle
        torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=0)


def whole_step(rank):
    plan = plan_of("gpt", "native")
    model = sharded(made("gpt"), by_block=True)
    step = assign.planned_step(model, class_loss, plan, backend="eager")
    optimizer = momentum(model)
    for batch in batches("gpt", rank):
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()
    return tensors(model)


def test_a_sharded_model_and_its_loss_in_one_graph(both):
    first, second = both(whole_step)
    assert same(first, second)
    assert not same(first, tensors(made("gpt")))


# ---- promotion


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))

    def forward(self, x):
        return torch.asinh(x * self.weight)


def promoted(rank, counts, shard):
    """What is promoted at each step, with so many elements too large in each process; and how often all talked."""
    plan = assign.search(Line(), torch.ones(1000), lambda m, x: m(x).sum(), low_ratio=1.0, space="hfp8")
    promotion = assign.Promotion(plan, every=2)
    planned = assign.apply(Line(), plan, backend="eager", promotion=promotion)
    wrapped = fully_shard(planned) if shard else DDP(planned)
    talks, all_reduce = [], dist.all_reduce
    found = []
    for count in counts:
        x = torch.ones(1000)
        x[: count[rank]] = 100.0
        wrapped(x).sum().backward()
        distributed.dist.all_reduce = lambda *args, **kwargs: (talks.append(1), all_reduce(*args, **kwargs))
        found.append([(past.step, past.key, past.overflow_ratio) for past in promotion.step()])
        distributed.dist.all_reduce = all_reduce
    return found, len(talks), promotion.plan.entries["/input"].format


@pytest.mark.parametrize("shard", [False, True])
def test_all_promote_what_overflows_in_one(both, shard):
    counts = [(0, 19), (900, 900), (0, 20), (0, 900)]  # looked at in the first and the third: 0.0095 and 0.01 of all
    for found, talks, name in both(promoted, counts, shard):
        assert found[0] == found[1] == found[3] == []
        assert (3, "/input", 0.01) in found[2]
        assert talks == 2
        assert name == "fp(6,9,0)"


def one_does_not_run(rank):
    plan = plan_of("mlp", "hfp8")
    promotion = assign.Promotion(plan)
    planned = assign.apply(made("mlp"), plan, backend="eager", promotion=promotion)
    if rank == 0:
        planned(vectors()[0])
    return refusal(promotion.step)


def test_promotion_needs_all_processes_to_run(both):
    first, second = both(one_does_not_run)
    assert first is None
    assert "other processes have run" in second
    assert "group=" in second


# ---- optimizers of sharded parameters


def update_rounded(rank, rounding):
    """A sharded step beside the same step on whole parameters."""
    plan = plan_of("gpt", "bf16", master="bf16")
    model = fsdp_model(plan, by_block=True, apply_first=True)
    optimizer = assign.optimizer(torch.optim.AdamW, model, plan, lr=1e-3, update_rounding=rounding)
    whole = [nn.Parameter(tensor) for tensor in tensors(model)]
    beside = updates.AdamW(whole, lr=1e-3, rounding=rounding)
    before = tensors(model)
    for batch in batches("gpt", rank):
        optimizer.zero_grad()
        class_loss(model, batch).backward()
        for parameter, each in zip(model.parameters(), whole, strict=True):
            each.grad = parameter.grad.full_tensor()
        optimizer.step()
        beside.step()
    states = {type(value) for state in optimizer.state.values() for value in state.values() if value.dim()}
    assert states == {DTensor}
    return tensors(model), [each.detach() for each in whole], before


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_updates_of_sharded_parameters(both, rounding):
    for sharded_, whole, before in both(update_rounded, rounding):
        assert not same(sharded_, before)
        if rounding == "kahan":
            assert same(sharded_, whole)
        for a, b in zip(sharded_, whole, strict=True):  # by chance, each of the three steps to either neighbour
            torch.testing.assert_close(a, b, rtol=3 * 2**-7, atol=3 * 2e-3)


def eight_bit(rank):
    model, batch = MLP(width=512), vectors()
    table = traced(model, batch, optimizer=lambda parameters: torch.optim.AdamW(parameters))
    plan = everything(table, "fp32").replace(store(table, states="dynamic8"))
    planned = fully_shard(assign.apply(model, plan, backend="eager"))
    optimizer = assign.optimizer(torch.optim.AdamW, planned, plan, lr=1e-3)
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its step for seconds
        class_loss(planned, batches("mlp", rank)[0]).backward()
        optimizer.step()
        state = optimizer.state[planned.first.weight]["exp_avg"]
        again = assign.optimizer(torch.optim.AdamW, planned, plan, lr=1e-3)
        again.load_state_dict(optimizer.state_dict())
        kept = again.state[planned.first.weight]["exp_avg"]
    local = state.to_local()
    return tensors(planned), type(local).__name__, local.codes, kept.to_local().codes


def test_8_bit_states_of_sharded_parameters(both):
    (first, name, codes, kept), (second, _, other, _) = both(eight_bit)
    assert same(first, second)
    assert name == "OptimState8bit"
    assert codes.shape == other.shape == (256, 16)
    assert codes.any()
    assert torch.equal(codes, kept)
    assert not torch.equal(codes, other)  # of another part of the weight


def monitored(rank):
    plan = plan_of("gpt", "bf16", master="bf16")
    shares = []
    for wrap in (sharded_root, DDP):
        model = wrap(assign.apply(made("gpt"), plan, backend="eager"))
        optimizer = assign.optimizer(torch.optim.SGD, model, plan, lr=1e-3)
        with assign.optim.LostUpdates(model, optimizer) as lost:
            trained(model, optimizer, batches("gpt", rank))
        shares.append(lost.shares)
    return shares


def replicated(rank):
    plan = plan_of("mlp", "bf16", master="bf16")
    ddp = DDP(assign.apply(made("mlp"), plan, backend="eager"))
    optimizer = assign.optimizer(torch.optim.SGD, ddp, plan, lr=1e-2, update_rounding="stochastic")
    data = batches("mlp", rank)
    torch.manual_seed(rank)
    return trained(ddp, optimizer, data), torch.rand(())


def test_updates_by_chance_are_the_same_in_every_process(both):
    (first, own), (second, other) = both(replicated)
    assert same(first, second)
    assert own != other  # what else is drawn stays each one's own


def sharded_root(model):
    return sharded(model, by_block=False)


def test_lost_updates_are_counted_in_each_part(both):
    (part, whole), (other, _) = both(monitored)
    assert part.keys() == whole.keys() == other.keys()
    assert "tokens.weight" in whole
    assert part != other
    for name, share in whole.items():
        assert min(part[name], other[name]) <= share <= max(part[name], other[name])


# ---- what is refused


def refusal(call):
    """The text of the error that ``call`` raises; None if it raises none."""
    try:
        call()
    except PlanError as error:
        return "\n".join([str(error), *getattr(error, "__notes__", ())])
    return None


def refused(rank, case):
    gradients, masters = plan_of("gpt", "bf16", gradients="bf16"), plan_of("gpt", "bf16", master="bf16")
    plan = plan_of("gpt", "bf16")
    ids, model = tokens()[0], made("gpt")
    apply = functools.partial(assign.apply, backend="eager")
    match case:
        case "ddp first":
            return refusal(lambda: apply(DDP(model), plan))
        case "buckets":
            return refusal(lambda: DDP(apply(model, gradients))(ids))
        case "narrow gradients":
            return refusal(lambda: apply(fully_shard(model), gradients))
        case "narrow gradients, sharded later":
            return refusal(lambda: fully_shard(apply(model, gradients))(ids))
        case "masters":
            return refusal(lambda: apply(fully_shard(model), masters))
        case "mixed masters":
            mixed = plan.replace({key: masters.entries[key] for key in ("norm.weight.master", "norm.bias.master")})
            return refusal(lambda: fully_shard(apply(model, mixed))(ids))
        case "policy":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
            return refusal(lambda: apply(sharded(model, by_block=True, mp_policy=policy), plan))
        case "no root":
            fully_shard(model.blocks[0])
            return refusal(lambda: apply(model, plan)(ids))
    table = traced(MLP(width=512), vectors(), optimizer=lambda parameters: momentum_of(parameters, case))
    narrow = everything(table, "fp32").replace(store(table, states="dynamic8"))
    width = fully_shard(apply(MLP(width=512), narrow))
    if case == "bitsandbytes":
        return refusal(lambda: assign.optimizer(torch.optim.SGD, width, narrow, lr=1e-3, momentum=0.9))
    wide = narrow.replace({f"second.weight.optim.{name}": narrow.entries["first.weight.optim.exp_avg"] for name in OF})
    return refusal(lambda: assign.optimizer(torch.optim.AdamW, width, wide, lr=1e-3))


OF = ("exp_avg", "exp_avg_sq")


def momentum_of(parameters, case):
    if case == "bitsandbytes":
        return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-3)


REFUSALS = {
    "ddp first": ("is a DistributedDataParallel", "DistributedDataParallel(assign.apply(model, plan))"),
    "buckets": ("'tokens.weight' as bf16", "buckets of fp32", "assign.distributed.data_parallel(planned)"),
    "narrow gradients": ("gradient of 'tokens.weight' as bf16", "its master as fp32", "'tokens.weight.grad.stored'"),
    "narrow gradients, sharded later": ("gradient of 'tokens.weight' as bf16", "its master as fp32"),
    "masters": (
        "'tokens.weight' as bf16",
        "sharded it as torch.float32",
        "fully_shard(assign.apply(model, plan))",
    ),
    "mixed masters": ("'the model' in one dtype", "as fp32", "as bf16", "shard them separately"),
    "policy": ("'the model'", "param_dtype=torch.bfloat16", "the plan decides"),
    "no root": ("'blocks.0' is sharded", "fully_shard(model)"),
    "bitsandbytes": ("bitsandbytes", "SGD", "torch.optim.AdamW"),
    "too small a part": ("second.weight", "1024 elements", "those in this process"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(both, case):
    for text in both(refused, case):
        assert text is not None
        assert all(part in text for part in REFUSALS[case]), text


def test_one_process_alone_needs_nothing_of_it():
    assert not distributed.is_several()
    counts = torch.ones(2)
    assert distributed.sum_over_ranks(counts, None) is counts
    model = MLP()
    assert distributed.unwrapped(model) is model


def test_training_refuses_torchrun(monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    task = assign.Task(
        model=MLP, loss=class_loss, train=[vectors()], evaluate=None, optimizer=torch.optim.SGD, epochs=1
    )
    with pytest.raises(TaskError, match=r"one of 2 processes[\s\S]*without torchrun"):
        train(task)
