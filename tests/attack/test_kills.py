"""A few kills of each command; ``kills.py`` does as many as it is asked for."""

import signal

import pytest
from attack.kills import COMMANDS, Found, attack, make_plan, session, temporary_files


@pytest.mark.attack
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_loses_nothing(name, tmp_path):
    make_plan(tmp_path)
    found = attack(name, 3, 1, tmp_path)
    assert found.faults == []
    assert found.kills.total() + found.done_before == 3


def test_what_is_left_is_seen(tmp_path):
    (tmp_path / ".plan.json-1234.tmp").touch()
    (tmp_path / "plan.json").touch()
    assert temporary_files(tmp_path) == [".plan.json-1234.tmp"]
    assert session(1 << 30) == []
    assert Found().kills[signal.SIGINT.name] == 0
