"""Search by training: what a study keeps, how its processes share it, and what is lost when one is killed."""

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torch.nn import functional as F

from assign.errors import BudgetError, PlanError, StudyError
from assign.memory.estimate import peak_bytes
from assign.plan.quality import is_maximized
from assign.plan.space import SearchSpace
from assign.planner import search_table
from assign.tasks import Task
from assign.tracing.tracer import trace
from assign.training.trials import STARTS, Settings
from assign.training.tuning import StudyOptions, tune

HERE = Path(__file__).parent


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, x):
        return self.layers(x)


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(256, 8, generator=generator), torch.randint(3, (256,), generator=generator)


def class_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Batches:
    """Two of them, each of which keeps one waiting."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __len__(self):
        return 2

    def __iter__(self):
        for _ in range(2):
            time.sleep(self.seconds)
            yield batch()


def judge(model):
    images, labels = batch()
    return {"accuracy": (model(images).argmax(1) == labels).float().mean().item()}


def make_task(_seed, seconds=0.0, epochs=1):
    return Task(
        name="net",
        model=Net,
        loss=class_loss,
        train=Batches(seconds),
        evaluate=judge,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        epochs=epochs,
    )


def trials_of(storage):
    """The study's trials, in order."""
    url = str(storage) if "://" in str(storage) else f"sqlite:///{storage}"
    opened = optuna.storages.RDBStorage(url)
    try:
        return optuna.load_study(study_name="assign", storage=opened).trials
    finally:
        opened.remove_session()
        opened.engine.dispose()


def count(storage, state):
    return sum(trial.state == state for trial in trials_of(storage))


@pytest.fixture
def table():
    return trace(Net(), batch(), class_loss, partial(torch.optim.SGD, lr=0.1))


def test_a_front_of_two_objectives(tmp_path, table):
    told = []
    found = tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=8), on_trial=told.append)
    assert found.trained == len(told) == 8
    assert found.metric == "accuracy"
    peaks = [each.peak_bytes for each in found.front]
    metrics = [each.metric for each in found.front]
    assert peaks == sorted(peaks)
    assert metrics == sorted(metrics)  # more bytes must buy something
    for each in found.front:
        assert each.peak_bytes == peak_bytes(table, each.plan.entries)
        each.plan.check_covers([row.key for row in table.paper_tensors], where="here")
    all_low = search_table(table, low_ratio=1.0)
    assert peaks[0] == peak_bytes(table, all_low.entries)


def test_a_budget_is_kept_and_the_best_metric_wins(tmp_path, table):
    fp32 = peak_bytes(table, {})
    low = peak_bytes(table, search_table(table, low_ratio=1.0).entries)
    budget = (fp32 + low) // 2
    found = tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=6), settings=Settings(budget=budget))
    (best,) = found.front
    assert best.peak_bytes <= budget
    tried = trials_of(tmp_path / "s.db")
    done = [trial for trial in tried if trial.state == TrialState.COMPLETE]
    assert all(trial.user_attrs["peak_bytes"] <= budget for trial in done)
    assert len({tuple(trial.user_attrs["low"]) for trial in done}) > 1
    assert best.metric == max(trial.values[0] for trial in done)


@pytest.mark.slow
def test_a_study_goes_on_and_repeats_itself(tmp_path):
    first = tune(make_task, storage=tmp_path / "a.db", options=StudyOptions(trials=6))
    again = tune(make_task, storage=tmp_path / "a.db", options=StudyOptions(trials=6))
    assert again == first
    more = tune(make_task, storage=tmp_path / "a.db", options=StudyOptions(trials=7))
    assert more.trained + more.pruned == 7
    other = tune(make_task, storage=tmp_path / "b.db", options=StudyOptions(trials=6))
    assert other == first


def test_greedy_plans_and_the_starts_come_first(tmp_path, table):
    start = search_table(table, low_ratio=0.5, strategy="greedy-smallest")
    tune(
        make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=len(STARTS)), starts=[start]
    )  # two of the greedy ones are equal
    tried = trials_of(tmp_path / "s.db")
    tried = [frozenset(trial.user_attrs["low"]) for trial in tried]
    low = frozenset(group.id for group in table.groups if all(start.entries[key].low for key in group.keys))
    assert tried[0] == low
    assert tried[1] == frozenset(group.id for group in table.groups)
    assert tried[-1] == frozenset()


def test_what_diverges_is_pruned(tmp_path):
    def task(seed):
        return dataclasses.replace(make_task(seed), optimizer=partial(torch.optim.SGD, lr=math.nan))

    found = tune(task, storage=tmp_path / "s.db", options=StudyOptions(trials=3))
    assert (found.trained, found.pruned, found.front) == (0, 3, ())


def test_what_falls_behind_is_pruned(tmp_path, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number > 0)
    found = tune(
        partial(make_task, epochs=3),
        storage=tmp_path / "s.db",
        options=StudyOptions(trials=3),
        settings=Settings(budget="100%"),
    )
    assert (found.trained, found.pruned) == (1, 2)
    tried = trials_of(tmp_path / "s.db")
    assert [sorted(trial.intermediate_values) for trial in tried[:3]] == [[1, 2, 3], [1], [1]]


def test_an_interrupted_trial_is_proposed_again(tmp_path, monkeypatch):
    """One that the sampler drew, too."""
    starts = tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=4))
    assert starts.trained == 4  # the greedy plans, of which two are equal

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("assign.training.trials.train", interrupt)
    with pytest.raises(KeyboardInterrupt):  # once it draws a plan that is not known
        tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=100))
    monkeypatch.undo()
    lost = trials_of(tmp_path / "s.db")[-2]
    tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=lost.number + 1))
    tried = trials_of(tmp_path / "s.db")
    assert lost.state == TrialState.FAIL
    assert any(trial.params == lost.params and trial.state == TrialState.COMPLETE for trial in tried)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"storage": "nowhere/s.db"}, StudyError, "no directory"),
        (
            {"storage": "postgresql://me:secret@127.0.0.1:1/none"},
            StudyError,
            r"postgresql://me:\*\*\*@127.0.0.1:1/none",
        ),
        ({"settings": Settings(metric="f1")}, StudyError, "accuracy, loss"),
        ({"settings": Settings(budget=1000)}, BudgetError, "everything low"),
    ],
)
def test_refusals(tmp_path, change, error, says):
    with pytest.raises(error, match=says) as raised:
        tune(make_task, **{"storage": tmp_path / "s.db", **change})
    assert "secret" not in str(raised.value)


def test_another_study_is_refused(tmp_path):
    tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1))
    with pytest.raises(StudyError, match="recipe is 'native', requested 'hfp8'"):
        tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1), settings=Settings(space="hfp8"))

    class Other(Net):
        def __init__(self):
            super().__init__()
            self.layers.append(nn.Tanh())

    def other(seed):
        return dataclasses.replace(make_task(seed), model=Other)

    with pytest.raises(StudyError, match="another model"):
        tune(other, storage=tmp_path / "s.db", options=StudyOptions(trials=1))


def test_plans_of_other_formats_are_no_start(tmp_path, table):
    start = search_table(table, strategy="uniform", space=SearchSpace(formats="fp16"))
    with pytest.raises(PlanError, match="fp16"):
        tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1), starts=[start])


def test_which_metrics_are_maximized():
    assert is_maximized("accuracy")
    assert not is_maximized("val_loss")
    assert not is_maximized("Perplexity")


@pytest.mark.slow
def test_two_workers_share_a_file(tmp_path):
    found = tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=8, workers=2))
    assert 8 <= found.trained + found.pruned <= 9


# ---- several machines


@pytest.fixture
def postgresql():
    """URL of a database of its own on loopback."""
    tools = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(tools[-1]) if tools else None)
    if initdb is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg")
    user = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory() as directory, socket.socket() as free:
        if user:
            shutil.chown(directory, "postgres")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        data = f"{directory}/data"
        subprocess.run([initdb, "-D", data, "-U", "assign", "--auth=trust"], check=True, stdout=subprocess.PIPE, **user)
        place = ["-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", directory]
        with Path(directory, "log").open("w") as log:
            server = subprocess.Popen([Path(initdb).with_name("postgres"), *place], stdout=log, stderr=log, **user)
        try:
            yield f"postgresql://assign@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # it ends its sessions
            server.wait()


def worker(url, trials, seconds):
    task = f"functools.partial(make_task, seconds={seconds}, epochs=2)"
    code = (
        "import functools; from test_tuning import make_task, tune\n"
        f"tune({task}, storage={url!r}, trials={trials}, heartbeat=1)"
    )
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_killed_process_loses_its_running_trial_alone(postgresql):
    first, second = worker(postgresql, 7, seconds=1), None  # slow: still at a trial when the second one has begun
    try:
        wait_for(lambda: count(postgresql, TrialState.COMPLETE) >= 1, first)
        second = worker(postgresql, 7, seconds=0.3)
        wait_for(lambda: count(postgresql, TrialState.RUNNING) == 2, second)
        first.send_signal(signal.SIGKILL)
        first.wait()
        before = [trial for trial in trials_of(postgresql) if trial.state == TrialState.COMPLETE]
        assert second.wait(timeout=120) == 0, second.stdout.read().decode()
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
                process.communicate()
    after = trials_of(postgresql)
    assert all(after[trial.number].values == trial.values for trial in before)
    (lost,) = [trial for trial in after if trial.state == TrialState.FAIL]
    assert any(trial.params == lost.params and trial.state == TrialState.COMPLETE for trial in after)
    assert sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in after) >= 7


def wait_for(what, process):
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read().decode()
        with contextlib.suppress(Exception):  # the study is not there yet
            if what():
                return
        time.sleep(0.2)
    raise AssertionError("nothing came in time")


@pytest.mark.parametrize("stored", [None, 1, 2.5, "master", ["master"], [["master", 5]], [["owner", "bf16"]], {"a": 5}])
def test_damaged_settings_of_a_study_are_a_study_error(stored):
    with pytest.raises(StudyError, match="the stored settings of the study 'mine'"):
        Settings.of("mine", {"settings": {"recipe": "bf16", "stored": stored}})
    with pytest.raises(StudyError, match="the stored settings of the study 'mine'"):
        Settings.of("mine", {"settings": stored or 0})


def test_settings_from_before_search_spaces_are_read():
    settings = {"recipe": "bf16", "update_rounding": "stochastic", "stored": [["master", "bf16"]], "epochs": 3}
    found = Settings.of("mine", {"settings": settings})
    space = SearchSpace(recipe="bf16", update_rounding="stochastic", master="bf16")
    assert found == Settings(space=space, epochs=3)
