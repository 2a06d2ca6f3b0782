"""Damaged and senseless files: refused with our own errors, quickly, and without anything run, loaded or written.

``python tests/attack/run.py --count 100000`` is the same at length.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_sample_of_damaged_files_does_no_harm() -> None:
    """In a process of its own: an audit hook stays until its process ends."""
    command = [sys.executable, str(HERE / "run.py"), "--count", "500", "--seed", "2"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=HERE.parent.parent)
    assert found.returncode == 0, found.stderr[-2000:]
    facts = json.loads(found.stdout.splitlines()[-1])
    assert facts["files"] >= 480
    assert facts["loaded"] > 20  # or the damage is too coarse to get past the first check
    assert (facts["foreign"], facts["slow"], facts["leaks"]) == (0, 0, 0), facts["kinds"]


@pytest.mark.slow
def test_files_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from kinds import Subjects; from nonsense import ALL, nonsense; from assign.errors import AssignError\n"
        "count = 0\n"
        "for kind in Subjects(Path(sys.argv[2])).kinds():\n"
        "    for what, content in nonsense(kind.name, kind.whole[0]) if kind.name in ALL else ():\n"
        "        path = Path(sys.argv[2]) / 'nonsense.json'\n"
        "        path.write_bytes(content)\n"
        "        count += 1\n"
        "        try:\n"
        "            kind.load(path)\n"
        "            print('accepted', what)\n"
        "        except AssignError as error:\n"
        "            if 'nonsense.json' not in str(error): print('without its place', what, error)\n"
        "        except BaseException as error:\n"
        "            print('foreign', what, repr(error))\n"
        "print(count)"
    )
    command = [sys.executable, "-c", code, str(HERE), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent.parent)
    assert found.returncode == 0, found.stderr[-2000:]
    *wrong, count = found.stdout.splitlines()
    assert wrong == []
    assert int(count) >= 140
