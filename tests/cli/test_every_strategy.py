"""Every command on a plan of every strategy."""

import pytest
from shell import run

from assign.strategies import BASELINES, STRATEGIES

TASK = """
import torch
from torch import nn
import assign

def task():
    inputs, classes = torch.randn(32, 8), torch.arange(32) % 2
    return assign.Task(
        model=lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 2)),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        train=[(inputs, classes)] * 2,
        evaluate=lambda model: {"accuracy": float((model(inputs).argmax(1) == classes).float().mean())},
        optimizer=torch.optim.AdamW,
        epochs=1,
    )
"""

EVERY_STRATEGY = [
    *(["--strategy", name, "--low-ratio", "0.5"] for name in STRATEGIES),
    *(["--strategy", name, "--recipe", "bf16"] for name in BASELINES),
    ["--strategy", "milp", "--low-ratio", "0.5"],
    ["--strategy", "optuna", "--budget", "99%", "--trials", "2", "--epochs", "1"],
]


@pytest.mark.slow
@pytest.mark.parametrize("options", EVERY_STRATEGY, ids=lambda options: options[1])
def test_every_command_takes_a_plan_of_every_strategy(tmp_path, monkeypatch, options):
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    mine = "mine.py:task"
    run("search", mine, *options, "-o", "p.json")
    assert "made by" in run("show", "p.json", "--task", mine, "--all")
    assert "Operators" in run("show", "p.json", "--task", mine, "--lowered")
    run("diff", "p.json", "p.json")
    run("estimate", mine, "--plan", "p.json")
    run("report", "p.json", "--task", mine, "-o", "p.html")
    run("train", mine, "--plan", "p.json", "--epochs", "1", "--backend", "eager")
    run("compare", mine, "--plan", "p.json", "--seeds", "1", "--epochs", "1", "--backend", "eager")
    run("certify", mine, "--plan", "p.json", "--epochs", "1", "--backend", "eager")
