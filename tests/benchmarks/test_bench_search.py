"""The benchmark of searches: its own arithmetic, and a small run that is stopped and goes on."""

import itertools
import json
import math
import random
import sys

import numpy as np
import pytest
import torch

from assign.formats.parsing import parse_saved
from assign.plan.keys import is_saved_key
from assign.plan.plan import Assignment, Entry
from benchmarks import bench_search
from benchmarks.searches import plans, training
from benchmarks.searches.subjects import WARM_UP, Paced, Subject


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise in place of Fashion-MNIST, and a text."""
    place = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 64), ("test", 40)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 10, count, dtype=np.uint8)
    np.savez(place / "fashion_mnist.npz", **arrays)
    (place / "tinyshakespeare.txt").write_text("To be, or not to be, that is the question. " * 100)
    return place


@pytest.fixture(scope="module")
def subject(data):
    return Subject.make("resnet18", data, 3, small=True)


def plan_of(subject, entries):
    return Assignment(entries=dict(entries), recipe="native", fingerprint=subject.table.fingerprint)


def exact(subject):
    return {row.key: Entry("fp32", False) for row in subject.table.paper_tensors}


# ---- plans


def test_a_seed_draws_one_plan_and_touches_what_is_free_alone(subject):
    table, free = subject.table, subject.free
    drawn = [plans.draw(table, free, seed) for seed in range(8)]
    assert drawn[3] == plans.draw(table, free, 3)
    assert len({plans.to_code(table, each) for each in drawn}) == 8
    rounded = {key for each in drawn for key, entry in each.items() if entry.format != "fp32"}
    assert rounded <= free
    assert any(map(is_saved_key, rounded))
    assert not any("cross_entropy" in key or "nll" in key for key in rounded)
    for each in drawn:
        assert {row.key for row in table.paper_tensors} <= set(each)


def test_a_code_is_read_back(subject):
    entries = plans.draw(subject.table, subject.free, 1)
    back = plans.of_code(subject.table, plans.to_code(subject.table, entries))
    assert {key: entry.format for key, entry in back.items()} == {key: e.format for key, e in entries.items()}


@pytest.mark.parametrize("seed", range(5))
def test_gact_is_the_best_of_all_that_take_no_more_bits(seed):
    rng = random.Random(seed)
    sensitivity = {name: rng.expovariate(1.0) for name in "abcd"}
    size = {name: rng.randint(1, 50) for name in sensitivity}
    budget = rng.uniform(2, 8) * sum(size.values())

    def bits_of(bits):
        return sum(size[name] * each for name, each in bits.items())

    def lost(bits):
        return sum(sensitivity[name] * 4.0**-each for name, each in bits.items())

    found = plans.gact(sensitivity, (8, 4, 2), size, lambda bits: bits_of(bits) <= budget)
    assert bits_of(found) <= budget
    everything = [dict(zip(sensitivity, each, strict=True)) for each in itertools.product((8, 4, 2), repeat=4)]
    assert lost(found) <= min(lost(each) for each in everything if bits_of(each) <= bits_of(found)) * (1 + 1e-12)


def test_gact_takes_the_fewest_bits_where_nothing_fits_and_the_most_where_all_does():
    assert plans.gact({"a": 1.0}, (8, 4, 2), {"a": 1}, lambda _: False) == {"a": 2}
    assert plans.gact({"a": 1.0}, (8, 4, 2), {"a": 1}, lambda _: True) == {"a": 8}


def test_every_format_has_a_letter():
    assert len({parse_saved(name) for name in plans.NAMES}) == len(plans.NAMES)
    low = {pair[1] for pair in plans.COARSE.by_role.values()}
    assert low <= set(plans.NAMES)


# ---- trainings


def test_the_learning_rate_rises_and_falls():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = Paced(lambda p: torch.optim.SGD(p, lr=1.0), 100)([weight])
    weight.grad, rates = torch.zeros(1), []
    for _ in range(100):
        optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates.index(max(rates)) == WARM_UP - 1
    assert rates == sorted(rates[:WARM_UP]) + sorted(rates[WARM_UP:], reverse=True)
    assert rates[0] == 1 / WARM_UP
    assert rates[-1] == pytest.approx(0.01)


def test_a_plan_without_rounding_trains_as_no_plan_does(subject):
    plain, planned = (training.train(subject, plan, [0, 1]) for plan in (None, plan_of(subject, exact(subject))))
    for one, other in zip(plain, planned, strict=True):
        assert {**one, "step_seconds": 0} == {**other, "step_seconds": 0}
    assert plain[0]["loss"] != plain[1]["loss"]
    (alone,) = training.train(subject, None, [1])
    assert {**alone, "step_seconds": 0} == {**plain[1], "step_seconds": 0}


def test_a_training_that_diverges_has_learned_nothing(subject):
    class Diverging(Subject):
        def batches(self, seed, count=None):
            first, *rest = super().batches(seed, count)
            return [first, *((torch.full_like(images, math.nan), labels) for images, labels in rest)]

    (run,) = training.train(Diverging(subject.task, 3), None, [0])
    (first,) = training.train(Subject(subject.task, 1), None, [0])
    assert run["diverged_at"] == 2
    assert run["loss"] == first["loss"]
    assert run["held_out_loss"] == training.judge(subject, subject.model(0))["held_out_loss"]


def test_a_gradient_errs_by_what_is_rounded_and_the_model_stays(subject):
    model, batches = subject.model(0), subject.batches(5, 2)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    entries = exact(subject)
    assert training.gradient_error(subject, model, plan_of(subject, entries), batches) == 0
    key = next(row.key for row in subject.table.paper_tensors if row.op == "conv2d")
    rounded = {**entries, key: Entry("fp(4,0,3)", True)}
    assert training.gradient_error(subject, model, plan_of(subject, rounded), batches) > 0
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_models_along_a_training_are_those_of_shorter_ones(subject):
    first, _, second = training.along(subject, 0, [0, 1, 2])
    assert torch.equal(first.linear.weight, subject.model(0).linear.weight)
    model = subject.model(0)
    list(training.fit(subject, model, lambda batch: subject.task.loss(model, batch), subject.batches(0)[:2]))
    assert torch.equal(second.linear.weight, model.linear.weight)


def test_the_gpt_is_judged_by_what_follows(data):
    subject = Subject.make("gpt", data, 2, small=True)
    inputs, following = subject.held_out[0]
    assert torch.equal(inputs[0, 1:], following[0, :-1])
    assert training.judge(subject, subject.model(0))["held_out_loss"] == pytest.approx(math.log(16), rel=0.1)
    (_, one), (_, other) = subject.batches(0, 1)[0], subject.batches(1, 1)[0]
    assert not torch.equal(one, other)


# ---- what it comes to


def row(predicted, *losses):
    names = dict.fromkeys(bench_search.PREDICTORS, predicted)
    return {"predicted": names, "together": predicted, "runs": [{"loss": each} for each in losses]}


FP32 = [{"loss": 1.0}, {"loss": 2.0}]


def test_a_gap_is_taken_seed_by_seed():
    assert bench_search.gap(row(0, 1.5, 2.25), FP32) == [0.5, 0.25]
    assert bench_search.spread([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert math.isnan(bench_search.spread([1.0]))


def test_agreement_is_of_ranks_and_seeds_are_compared_with_the_others():
    drawn = [row(0.1, 1.1, 2.0), row(0.2, 1.2, 2.4), row(40.0, 1.9, 2.2)]  # gaps .05, .3, .55; seeds: 0 1 2, 0 2 1
    found = bench_search.agreement(drawn, FP32)
    assert found["along"] == found["together"] == pytest.approx(1)
    assert found["other seeds"] == pytest.approx(0.5)
    assert bench_search.agreement(list(reversed(drawn)), FP32) == pytest.approx(found)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    file = tmp_path / "result.json"

    def start(*arguments):
        options = ["--data", str(data), "--small", "--models", "resnet18", "--seeds", "1"]
        monkeypatch.setattr(sys, "argv", ["bench_search.py", *options, "--output", str(file), *arguments])
        bench_search.main()
        return json.loads(file.read_text())

    return start


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_and_tries_all_strategies_at_the_same_bytes(run, monkeypatch, capsys):
    measured, drawn = [], []
    measure, draw = bench_search.measure_noise, plans.draw
    monkeypatch.setattr(
        bench_search,
        "measure_noise",
        lambda *args, **options: measured.append(measure(*args, **options)) or measured[-1],
    )
    first = run("--parts", "a", "--plans", "1")["models"]["resnet18"]
    monkeypatch.setattr(bench_search, "measure_noise", lambda *_, **__: measured.pop(0))  # the same again
    monkeypatch.setattr(plans, "draw", lambda *args: drawn.append(args[2]) or draw(*args))
    found = run("--plans", "2")["models"]["resnet18"]
    assert drawn == [1]
    assert found["drawn"][0] == first["drawn"][0]
    assert found["fp32"] == first["fp32"]
    by_name = {(each["strategy"], each["recipe"]): each for each in found["searches"]}
    for recipe in ("coarse", "native"):
        budget = found["peaks"][recipe]["budget"]
        names = ("milp", "milp by tensor", "greedy", "greedy-smallest", "greedy-random", "uniform")
        assert all(by_name[name, recipe]["peak_bytes"] <= budget for name in names)
        noise = {name: by_name[name, recipe]["predicted"]["along"] for name in names}
        assert noise["milp by tensor"] <= noise["milp"] * (1 + 1e-6)
        assert noise["milp"] <= noise["greedy"] * (1 + 1e-6)
    assert by_name["optuna", "native"]["peak_bytes"] <= found["peaks"]["native"]["budget"]
    printed = capsys.readouterr().out
    assert "Spearman, along" in printed
    assert printed.count("\n| ") == len(by_name) + 1
    with pytest.raises(SystemExit, match="was begun with"):
        run("--steps", "1")
