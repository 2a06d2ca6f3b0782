"""A slice of the zoo: library models with the model's own loss, under plans, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "benchmarks" / "zoo" / "try_model.py"


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), [("causal", "llama"), ("seq2seq", "m2m_100")])
def test_a_library_model_works_under_plans(task, name):
    """The second one looks at values of its batch and draws random numbers to leave layers out."""
    command = [sys.executable, str(WORKER), task, name]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    row = json.loads(next(each for each in ended.stdout.splitlines() if each.startswith("RESULT "))[7:])
    assert row["result"] == "ok", row
