"""Two threads, and two processes, compute what one alone computes, and change no setting of torch."""

import copy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import all_low, traced
from models import GPT, MLP, class_loss, tokens, vectors

import assign
from assign.numerics import matmul  # noqa: F401 - registers the operator

STEPS = 3


def settings():
    """Settings of the whole process that a thread could find changed."""
    return {
        "precision": torch.get_float32_matmul_precision(),
        "onednn": (torch.backends.mkldnn.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "dynamo": torch._dynamo.config.get_config_copy(),
        "functorch": torch._functorch.config.get_config_copy(),
        "inductor": torch._inductor.config.get_config_copy(),
        "unraisable": sys.unraisablehook,
        "excepthook": threading.excepthook,
    }


def train(model, step, batch):
    """Losses, and the weights afterwards; gradients are asked for, not stored on the model."""
    weights = [*model.parameters()]
    losses = []
    for _ in range(STEPS):
        loss = step(batch)
        gradients = torch.autograd.grad(loss, weights)
        losses.append(loss.detach().clone())
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= 0.1 * gradient.to(weight.dtype)
    return [*losses, *(weight.detach().clone() for weight in weights)]


def gradients_of(model, step, batch):
    """Loss and gradients of one step, several times."""
    found = []
    for _ in range(STEPS):
        loss = step(batch)
        found += [loss.detach().clone(), *torch.autograd.grad(loss, [*model.parameters()])]
    return found


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def together(*calls):
    """Results of calls that begin at the same time, each in a thread of its own."""
    begin = threading.Barrier(len(calls))

    def run(call):
        begin.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [*pool.map(run, calls)]


@pytest.mark.parametrize("recipe", ["native", "hfp8"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_threads_train_two_models(recipe, backend):
    torch.manual_seed(0)
    cases = [(MLP(), vectors()), (GPT(), tokens())]
    plans = [all_low(traced(model, batch), recipe) for model, batch in cases]

    def work(number):
        model, batch = copy.deepcopy(cases[number][0]), cases[number][1]
        step = assign.planned_step(model, class_loss, plans[number], backend=backend)
        return lambda: train(model, step, batch)

    alone = [work(number)() for number in range(2)]
    before = settings()
    found = together(work(0), work(1), work(0))
    assert settings() == before
    assert [equal(a, b) for a, b in zip(found, [*alone, alone[0]], strict=True)] == [True] * 3


@pytest.mark.parametrize("recipe", ["native", "hfp8"])
def test_two_threads_use_one_model(recipe):
    torch.manual_seed(0)
    model, batches = MLP(), [vectors(), vectors()]
    plan = all_low(traced(model, batches[0]), recipe)
    alone = [gradients_of(model, assign.planned_step(model, class_loss, plan, backend="eager"), b) for b in batches]
    step = assign.planned_step(model, class_loss, plan, backend="eager")
    before = settings()
    found = together(*(lambda batch=batch: gradients_of(model, step, batch) for batch in batches))
    assert settings() == before
    assert [*map(equal, found, alone)] == [True, True]


def test_a_plain_thread_beside_emulated_products_computes_what_it_does_alone():
    torch.manual_seed(0)
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    narrow = a.bfloat16().float()
    expected = a @ b

    def emulated():
        return [torch.ops.assign.product(narrow, narrow, "fp(8,7,0)", "fp(8,7,0)") for _ in range(30)]

    def plain():
        return [torch.equal(a @ b, expected) for _ in range(30)]

    assert all(together(emulated, plain)[1])


PROCESS = """
import sys; sys.path[:0] = [sys.argv[1], sys.argv[1] + "/executor"]
import torch
from helpers import all_low, traced
from models import MLP, class_loss, vectors
import assign
torch.manual_seed(0)
model, batch = MLP(), vectors()
plan = all_low(traced(model, batch))
step = assign.planned_step(model, class_loss, plan, backend="inductor")
from test_threads import train
torch.save(train(model, step, batch), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_with_one_cache_compute_the_same(tmp_path):
    paths = [tmp_path / f"{number}.pt" for number in range(2)]
    commands = [[sys.executable, "-c", PROCESS, str(Path(__file__).parents[1]), str(path)] for path in paths]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0, 0]
    first, second = (torch.load(path, weights_only=True) for path in paths)
    assert equal(first, second)
