"""Models, weights and graphs are freed with the last reference to what ``assign`` made of them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import MLP, class_loss, vectors
from torch import fx
from torch._dynamo.eval_frame import cached_backends

import assign
from assign.errors import AssignError
from assign.noise.options import NoiseOptions
from assign.planner import search_table


def branching_loss(model, batch):
    """The loss of a step in several pieces."""
    loss = class_loss(model, batch)
    return loss * 2 if loss > 1e9 else loss


@pytest.fixture(scope="module")
def made():
    """Table and plan of the model."""
    table = assign.trace(MLP(), vectors(), class_loss)
    return table, search_table(table, low_ratio=0.5)


def _autocast(model, loss, plan):
    with assign.autocast(model, plan, backend="eager"):
        loss(model, vectors()).backward()


def _step(model, loss, plan, backend):
    assign.planned_step(model, loss, plan, backend=backend)(vectors()).backward()


USES = {
    "trace": lambda model, loss, table, plan: assign.trace(model, vectors(), loss),
    "search": lambda model, loss, table, plan: assign.search(model, vectors(), loss, low_ratio=0.5),
    "search, a step": lambda model, loss, table, plan: assign.search(
        assign.trace(model, vectors(), loss), low_ratio=0.5, strategy="milp"
    ),
    "apply": lambda model, loss, table, plan: loss(assign.apply(model, plan, backend="eager"), vectors()).backward(),
    "planned_step": lambda model, loss, table, plan: _step(model, loss, plan, "eager"),
    "planned_step, compiled": lambda model, loss, table, plan: _step(model, loss, plan, "inductor"),
    "autocast": lambda model, loss, table, plan: _autocast(model, loss, plan),
    "measure_noise": lambda model, loss, table, plan: assign.measure_noise(
        model, [vectors()], loss, options=NoiseOptions(max_batches=1)
    ),
    "measure_times": lambda model, loss, table, plan: assign.measure_times(model, vectors(), loss, repeats=1),
    "rehearse": lambda model, loss, table, plan: assign.rehearse(model, vectors(), loss, plan, table),
}


def _counts():
    for _ in range(3):  # a finalizer may leave something to collect
        gc.collect()
    return sum(issubclass(type(each), (fx.Node, fx.GraphModule)) for each in gc.get_objects()), len(cached_backends)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [class_loss, branching_loss])
@pytest.mark.parametrize("use", USES)
def test_a_model_is_freed_after_each_public_function(use, loss, made):
    """The first use may fill caches of torch; after that nothing stays."""
    USES[use](MLP(), loss, *made)
    before = _counts()
    for _ in range(2):
        model = MLP()
        weights = [weakref.ref(parameter) for parameter in model.parameters()]
        USES[use](model, loss, *made)
        kept = weakref.ref(model)
        del model
        assert _counts() == before
        assert kept() is None
        assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("use", [use for use in USES if use != "rehearse"])
def test_a_model_is_freed_after_an_error(use, made):
    def failing_loss(model, batch):
        class_loss(model, batch)
        raise ZeroDivisionError

    before = None
    for _ in range(3):
        model = MLP()
        with pytest.raises((ZeroDivisionError, AssignError)):
            USES[use](model, failing_loss, *made)
        kept = weakref.ref(model)
        del model
        found = _counts()
        assert kept() is None
        assert before in (None, found)
        before = found


def test_a_planned_model_outlives_the_users_own_reference(made):
    model, batch = MLP(), vectors()[0]
    planned = assign.apply(model, made[1], backend="eager")
    del model
    gc.collect()
    first = planned(batch)
    gc.collect()
    assert torch.equal(first, planned(batch))


def test_what_the_user_compiled_is_not_compiled_again(made):
    """Other models of the user, and their code, keep what Dynamo compiled for them."""
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph

    own = torch.compile(MLP(), backend=backend)
    own(vectors()[0])
    for use in ("trace", "apply"):
        USES[use](MLP(), class_loss, *made)
    gc.collect()
    own(vectors()[0])
    assert len(compiled) == 1


def test_a_copy_of_a_model_under_autocast_takes_nothing_compiled_with_it(made):
    model = MLP()
    _autocast(model, class_loss, made[1])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.__dict__["_assign_planned"] == {}
        _autocast(twin, class_loss, made[1])


@pytest.mark.attack
def test_the_six_hundredth_model_is_still_planned(made):
    """Dynamo gives up on code that it has compiled too often for other objects."""
    losses = set()
    for number in range(600):
        torch.manual_seed(0)
        step = assign.planned_step(MLP(), class_loss, made[1], backend="eager")
        loss = step((torch.ones(8, 16), torch.arange(8) % 4))
        loss.backward()
        losses.add(float(loss.detach()))
        if number % 100 == 99:
            torch.manual_seed(0)
            plain = float(class_loss(MLP(), (torch.ones(8, 16), torch.arange(8) % 4)).detach())
            assert losses != {plain}
    assert len(losses) == 1
