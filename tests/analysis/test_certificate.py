"""The tolerance certificate: what it counts, that its lemma holds, and how a shell asks for it."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shell import fails, run
from torch import nn

import assign
from assign.analysis.certificate import certify, certify_task, quantiles
from assign.errors import TaskError
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.tasks import TaskOptions, load_task
from assign.tracing.tracer import trace
from assign.training.loop import train
from assign.training.options import TrainOptions


def mlp():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def test_a_random_mlp_in_fp16():
    """arXiv 2305.10947's check: 99.8 % certified, no violation, one disagreement of 4096.

    Measured with the seeds 0 to 7: 99.59 to 99.85 %, on average 99.78, and 1 to 5 disagreements; with seed 0 the very
    numbers. Counts of a few in 4096, and sums that other machines add up in another order: hence the room.
    """
    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        model = mlp()
        half = copy.deepcopy(model).half()
        found.append(certify(model, lambda x, half=half: half(x.half()), torch.randn(4096, 784).split(512)))
    assert {(each.samples, each.violations, each.non_finite) for each in found} == {(4096, 0, 0)}
    assert sum(each.certified_share for each in found) / 5 == pytest.approx(0.998, abs=0.0015)
    assert 1 <= sum(each.disagreements for each in found) <= 25


def by_hand(ours, theirs, **options):
    return certify(lambda x: torch.tensor(ours), lambda x: torch.tensor(theirs), [torch.zeros(1)], **options)


def test_counts_by_hand():
    ours = [[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.49, 0.01], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]
    theirs = [[0.5, 0.3, 0.2], [0.45, 0.38, 0.17], [0.49, 0.5, 0.01], [0.39, 0.3, 0.31], [float("nan")] * 3]
    found = by_hand(ours, theirs, probabilities=True)
    assert (found.samples, found.certified, found.disagreements, found.violations, found.non_finite) == (5, 2, 2, 0, 1)
    assert found.margins[:4].tolist() == pytest.approx([0.2, 0.2, 0.01, 0.2])
    assert found.deviations[:4].tolist() == pytest.approx([0, 0.08, 0.01, 0.11])
    assert found.certified_share == 0.4
    data = found.to_json()
    assert data["margin"]["0"] == pytest.approx(0.01)
    assert data["deviation"]["1"] == pytest.approx(0.11)
    json.dumps(data, allow_nan=False)


def test_logits_are_made_probabilities():
    logits = [[2.0, 1.0, -1.0]]
    found = by_hand(logits, logits)
    expected = torch.tensor(logits).double().softmax(-1)
    assert found.margins.item() == pytest.approx((expected[0, 0] - expected[0, 1]).item())
    assert found.deviations.item() == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**20), noise=st.floats(0, 3), classes=st.integers(2, 12))
def test_the_lemma(seed, noise, classes):
    """Whatever the other model says: no sample with Γ > 2δ is predicted differently."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(256, classes, generator=generator)
    other = logits + noise * torch.randn(256, classes, generator=generator)
    found = certify(lambda x: logits, lambda x: other, [torch.zeros(1)])
    assert found.violations == 0
    assert found.certified + found.disagreements <= found.samples


def test_positions_classes_and_what_models_return():
    logits = torch.randn(2, 5, 3, 4)
    assert certify(lambda x: logits, lambda x: logits, [(logits,)], class_axis=1).samples == 2 * 3 * 4
    assert certify(lambda x: logits, lambda x: logits, [logits]).samples == 2 * 5 * 3
    wrapped = certify(
        lambda **k: {"logits": k["x"]}, lambda x: SimpleNamespace(logits=x), [{"x": logits}, {"x": logits}]
    )
    assert wrapped.samples == 2 * 2 * 5 * 3


def test_modules_are_judged_in_eval_mode_and_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model[2].eval()
    mean = model[2].running_mean.clone()
    found = certify(model, copy.deepcopy(model), [torch.randn(64, 4)])
    assert found.deviations.max() == 0
    assert [part.training for part in model.modules()] == [True, True, True, False]
    assert torch.equal(model[2].running_mean, mean)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify(mlp(), mlp(), []), "certify: there is no batch"),
        (lambda: certify(mlp(), mlp(), [torch.zeros(0, 784)]), "certify: there is no batch"),
        (lambda: by_hand([[1.0]], [[1.0]]), r"float32 of shape \[1, 1\], and axis -1 must be the classes"),
        (lambda: by_hand([[1]], [[1]]), r"int64 of shape \[1, 1\]"),
        (lambda: by_hand([1.0, 2.0], [1.0, 2.0]), r"float32 of shape \[2\]"),
        (lambda: by_hand([[1.0, 2.0]], [[1.0, 2.0]], class_axis=2), "and axis 2 must be the classes"),
        (lambda: certify(lambda x: None, lambda x: None, [1]), "the model returns a NoneType"),
        (lambda: by_hand([[1.0, 2.0]], [[1.0, 2.0, 3.0]]), r"are \[1, 2\] for the model, \[1, 3\] for the other"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(TaskError, match=message) as caught:
        call()
    assert "Allowed: " in str(caught.value)


def test_quantiles():
    assert quantiles(torch.tensor([3.0, float("nan"), 1.0, 2.0]))["0.5"] == 2.0
    assert quantiles(torch.tensor([float("nan")])) == {}


# ---- under a plan


@pytest.mark.slow
def test_digits_under_plans():
    pytest.importorskip("sklearn")
    task = load_task("digits", TaskOptions(width=0.5))
    trained = train(task, options=TrainOptions(epochs=5)).model
    table = trace(task.make_model(), task.first_batch(), task.loss, task.optimizer)
    model = trained.train()
    found = {}
    for name in ("fp32", "bf16", "e4m3:pow2"):
        plan = search_table(table, strategy="uniform", space=SearchSpace(formats=name))
        found[name] = certify_task(task, model, plan)
        assert found[name].samples == 517
        assert found[name].violations == 0
    assert model.training
    assert found["fp32"].deviations.max() == 0
    assert found["fp32"].certified == 517
    assert found["bf16"].certified_share > found["e4m3:pow2"].certified_share > 0
    assert found["bf16"].certified_share > 0.9
    with torch.no_grad():
        model.eval()
        same = certify(model, assign.apply(model, plan, backend="eager"), [task.evaluate.keywords["images"]])
    assert torch.equal(same.deviations, found["e4m3:pow2"].deviations)


TASK = """
import torch
from torch import nn
import assign

torch.manual_seed(0)
data = [(x, (x.sum(1) > 0).long()) for x in torch.randn(6, 32, 8)]

def task():
    def evaluate(model):
        assert model[0].in_features == 8
        return {"accuracy": sum((model(x).argmax(1) == y).double().mean().item() for x, y in data[4:]) / 2}

    class Model(nn.Sequential):
        pass

    return assign.Task(
        model=lambda: Model(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2)),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        train=data[:4],
        evaluate=evaluate,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        epochs=3,
    )

def blind():
    import dataclasses
    return dataclasses.replace(task(), evaluate=None)

def idle():
    import dataclasses
    return dataclasses.replace(task(), evaluate=lambda model: None)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_certify_in_a_shell(here, monkeypatch, capsys):
    run("search", "mine.py", "--strategy", "uniform", "--format", "fp(3,1,2)", "-o", "p.json")
    run("train", "mine.py", "--checkpoint", "c.pt")
    output = run("certify", "mine.py", "--plan", "p.json", "--checkpoint", "c.pt", "--json", "a.json")
    for words in ("Tolerance certificate", "certified (Γ > 2δ)", "margin Γ", "64"):
        assert words in output
    found = json.loads((here / "a.json").read_text())
    assert (found["samples"], found["violations"]) == (64, 0)
    assert 0 < found["certified"] < 64
    assert found["deviation"]["1"] > 0
    run("certify", "mine.py", "--plan", "p.json", "--json", "b.json")  # trains it itself, with the same seed
    assert json.loads((here / "b.json").read_text()) == found
    run("certify", "mine.py", "--plan", "p.json", "--epochs", "1", "--json", "d.json")
    assert json.loads((here / "d.json").read_text()) != found
    assert "no evaluate(model)" in fails(capsys, monkeypatch, "certify", "mine.py:blind", "--plan", "p.json")
    assert "there is no batch" in fails(capsys, monkeypatch, "certify", "mine.py:idle", "--plan", "p.json")
