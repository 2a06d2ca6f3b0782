"""Files that earlier versions wrote are read, and give the numbers that they gave then."""

import json
import shutil
from pathlib import Path

import pytest
from golden.make import PLANS, numbers

from assign.plan.plan import Assignment

WRITTEN = sorted(
    path for path in (Path(__file__).parent / "golden").iterdir() if path.is_dir() and path.name[0].isdigit()
)


@pytest.mark.slow
@pytest.mark.parametrize("directory", WRITTEN, ids=lambda path: path.name)
def test_files_of_earlier_versions_give_the_same_numbers(directory, tmp_path):
    """Bytes are equal; losses are within what the order of sums on another CPU changes in bf16."""
    shutil.copytree(directory, tmp_path / "golden")
    expected = json.loads((directory / "numbers.json").read_text())
    found = json.loads(json.dumps(numbers(tmp_path / "golden")))
    for name in PLANS:
        metric, reference = found[name].pop("accuracy"), expected[name].pop("accuracy")
        assert metric == pytest.approx(reference, abs=0.13), name  # two of sixteen samples
    for where in (*PLANS, "resumed"):
        assert found[where].pop("loss") == pytest.approx(expected[where].pop("loss"), abs=2**-8), where
    assert found.pop("noise") == pytest.approx(expected.pop("noise"), rel=1e-3)
    assert found == expected


@pytest.mark.parametrize("directory", WRITTEN, ids=lambda path: path.name)
def test_a_plan_that_is_written_again_is_the_same_file(directory, tmp_path):
    for name in PLANS:
        Assignment.load(directory / f"{name}.json").save(tmp_path / "again.json")
        assert json.loads((tmp_path / "again.json").read_text()) == json.loads((directory / f"{name}.json").read_text())
