"""Updates lost to rounding, counted while training."""

import json

import pytest
import torch
from torch import nn

from assign.errors import TaskError
from assign.optim.monitor import LostUpdates
from assign.optim.updates import SGD, AdamW
from assign.report.audits import lost_table
from assign.report.terminal import Terminal


class Two(nn.Module):
    """Weights of 1 and weights of 2^-10."""

    def __init__(self, elements=1000, dtype=torch.bfloat16):
        super().__init__()
        self.large = nn.Parameter(torch.ones(elements, dtype=dtype))
        self.small = nn.Parameter(torch.full((elements,), 2.0**-10, dtype=dtype))


def steps(model, optimizer, count=4, grad=1.0):
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, grad)
        optimizer.step()


def sgd(model, **options):
    return SGD(model.parameters(), lr=1e-3, **options)


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.SGD(model.parameters(), lr=1e-3)])
def test_what_nearest_loses(make):
    model = Two()
    optimizer = make(model)
    with LostUpdates(model, optimizer) as lost:
        steps(model, optimizer)
    assert lost.shares == {"large": 1.0, "small": 0.0}
    assert lost.share == 0.5
    steps(model, optimizer, count=1)  # no longer watched
    assert lost.to_json() == {"steps": 4, "every": 1, "share": 0.5, "parameters": {"large": 1.0, "small": 0.0}}
    json.dumps(lost.to_json())


def test_what_the_compensation_holds_is_not_lost():
    model = Two()
    optimizer = sgd(model, rounding="kahan")
    with LostUpdates(model, optimizer) as lost:
        steps(model, optimizer, count=1)
    assert lost.share == 0
    assert (model.large == 1).all()  # not yet


def test_by_chance_most_stay():
    """Below 1, an update of -1e-3 is 0.256 of a step of 2^-8: 74.4 % stay."""
    model = Two(20_000)
    optimizer = sgd(model, rounding="stochastic")
    with LostUpdates(model, optimizer, sample=None) as lost:
        steps(model, optimizer)
    assert lost.shares["large"] == pytest.approx(1 - 1e-3 * 2**8, abs=5 * (0.256 * 0.744 / 80_000) ** 0.5)
    assert lost.shares["small"] == 0


def test_float32_loses_nothing():
    model = Two(dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with LostUpdates(model, optimizer) as lost:
        steps(model, optimizer)
    assert lost.share == 0


def test_no_update_cannot_be_lost():
    """No gradient, moment or learning rate: nothing was tried. A moment or weight decay pulls without a gradient."""
    model = Two()
    for optimizer, grad, expected in (
        (sgd(model), 0.0, None),
        (SGD(model.parameters(), lr=0.0), 1.0, None),
        (SGD(model.parameters(), lr=1e-6, weight_decay=0.1), 0.0, 1.0),
        (AdamW(model.parameters(), lr=1e-9, weight_decay=0.0), 0.0, None),
        (AdamW(model.parameters(), lr=1e-9, weight_decay=0.1), 0.0, 1.0),
        (torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9), 1.0, 1.0),
    ):
        with LostUpdates(model, optimizer) as lost:
            steps(model, optimizer, grad=grad)
        assert lost.share == expected
    moving = SGD(model.parameters(), lr=1e-9, momentum=0.9)
    steps(model, moving)
    with LostUpdates(model, moving) as lost:
        steps(model, moving, grad=0.0)
    assert lost.share == 1.0


def test_every_so_many_steps_and_a_sample():
    model = Two(10_000)
    with torch.no_grad():
        model.large[::2] = 2.0**-10
    optimizer = sgd(model)
    looked = LostUpdates(model, optimizer, every=3, sample=999)
    steps(model, optimizer, count=7)
    assert looked.to_json()["steps"] == 7
    assert looked.shares["large"] == pytest.approx(0.5, abs=0.05)
    assert looked._counts["large"][1] == 3 * 910  # steps 1, 4, 7; every 11th element
    looked.reset()
    assert looked.share is None
    steps(model, optimizer, count=1)
    assert looked.share is None  # the eighth
    steps(model, optimizer, count=2)
    assert looked.share is not None
    looked.detach()


def test_a_compiled_step_is_watched_too():
    model = Two()
    optimizer = sgd(model)
    torch.compiler.reset()
    with LostUpdates(model, optimizer) as lost:
        compiled = torch.compile(optimizer.step, backend="eager")
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            compiled()
    assert lost.shares == {"large": 1.0, "small": 0.0}
    assert lost.to_json()["steps"] == 3


def test_table_and_errors():
    model = Two()
    optimizer = sgd(model)
    with LostUpdates(model, optimizer) as lost:
        steps(model, optimizer)
    console = Terminal(width=100)
    with console.capture() as captured:
        console.print(lost_table(lost))
    assert captured.get().index("large") < captured.get().index("small")
    assert "100.00%" in captured.get()
    assert "all parameters: 50.00%" in captured.get()
    with pytest.raises(TaskError, match=r"every=0, sample=65536.\n  Allowed"):
        LostUpdates(model, optimizer, every=0)
