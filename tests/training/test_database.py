"""A study's database under many processes at once, on odd paths, on a full disk, and when its processes are killed."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from attack.kills import session
from test_tuning import make_task, tune

import assign
from assign.errors import StudyError
from assign.training.database import exclusive, explained, open_database
from assign.training.tuning import StudyOptions

ROOT = Path(__file__).parents[2]

OPEN_AND_CLAIM = """
import sys, time, warnings
import optuna
from assign.training.database import exclusive, open_database
warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
path, start, waiting = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
time.sleep(max(0.0, start - time.time()))
storage = open_database(path, 30)
with exclusive(path):
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    if not study.get_trials(deepcopy=False):
        for number in range(waiting):
            study.enqueue_trial({"x": number})
mine = []
while (claimed := study._pop_waiting_trial_id()) is not None:
    mine.append(claimed)
print(*mine)
"""


def start(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/training")))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.slow
def test_processes_that_start_at_once_share_the_trials_that_wait(tmp_path):
    begin, waiting = time.time() + 6, 40
    processes = [start(OPEN_AND_CLAIM, tmp_path / "s.db", begin, waiting) for _ in range(8)]
    claimed = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        claimed += map(int, out.split())
    assert sorted(claimed) == list(range(1, waiting + 1))  # each once


@pytest.mark.filterwarnings("ignore")
def test_who_reads_a_trial_in_order_to_claim_it_is_the_only_one(tmp_path):
    path = str(tmp_path / "s.db")
    storage = open_database(path, 30)
    other = sqlite3.connect(path, timeout=0.1)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("SELECT * FROM trials")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("UPDATE trials SET state = 'RUNNING'")
    other.execute("UPDATE trials SET state = 'RUNNING'")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a?b.db", "50%.db", "%3F.db", "{x}.db", "#1.db", "a b.db"])
def test_odd_paths(tmp_path, name):
    storage = open_database(str(tmp_path / name), 30)
    optuna.create_study(storage=storage, study_name="s")
    storage.engine.dispose()
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert optuna.get_all_study_names(open_database(str(tmp_path / name), 30)) == ["s"]


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_is_said(tmp_path):
    path = str(tmp_path / "s.db")
    storage = open_database(path, 30)
    study = optuna.create_study(storage=storage, study_name="s")
    (pages,) = sqlite3.connect(path).execute("PRAGMA page_count").fetchone()
    from sqlalchemy import event

    @event.listens_for(storage.engine, "checkout")
    def limit(connection, *_):  # what SQLite says then is what it says on a full disk
        connection.execute(f"PRAGMA max_page_count = {pages}")

    def objective(trial):
        trial.set_user_attr("long", "x" * 1900)
        return 0.0

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with pytest.raises(StudyError, match=r"full\n.*\n.*same command again"), explained(path):
        study.optimize(objective, n_trials=200)


def test_other_errors_stay_what_they_are():
    with pytest.raises(AssertionError, match="of ours"), explained("s.db"):
        raise AssertionError("of ours")


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_database_is_said(tmp_path):
    (tmp_path / "s.db").write_bytes(b"no database at all, however long the file is " * 50)
    with pytest.raises(StudyError, match=r"s\.db.*not a database"):
        open_database(str(tmp_path / "s.db"), 30)


def test_one_process_at_a_time_is_exclusive(tmp_path):
    code = "import sys; from assign.training.database import exclusive\nwith exclusive(sys.argv[1]): print('in')"
    with exclusive(str(tmp_path / "s.db")):
        process = start(code, tmp_path / "s.db")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
    assert process.communicate(timeout=60)[0] == "in\n"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("url", ["nosuch://me:hidden@host/name", "nosuch://host/name?user=me&password=hidden"])
def test_errors_mask_the_password_of_a_url(url):
    with pytest.raises(StudyError) as raised:
        open_database(url, 30)
    assert "host/name" in str(raised.value)
    assert "hidden" not in str(raised.value)


TUNE = """
import functools, sys
from test_tuning import make_task, tune
from assign.cli.stopping import repeat_lost_interrupts
if __name__ == "__main__":
    repeat_lost_interrupts()
    try:
        tune(functools.partial(make_task, seconds=0.5), storage=sys.argv[1], trials=200, workers=2)
    except KeyboardInterrupt:
        sys.exit(130)
"""


def running_trials(path):
    """Trials that processes train at this moment; 0 while the database is being made."""
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
        try:
            return database.execute("SELECT count(*) FROM trials WHERE state = 'RUNNING'").fetchone()[0]
        except sqlite3.OperationalError:
            return 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_the_process_that_started_them(tmp_path, number):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    script = tmp_path / "script.py"
    script.write_text(TUNE)
    process = start(
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')",
        script,
        tmp_path / "s.db",
        start_new_session=True,
    )
    until = time.monotonic() + 100
    while time.monotonic() < until and running_trials(tmp_path / "s.db") < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    assert len(session(process.pid)) == 3  # this one, multiprocessing's, and the worker
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == (130 if number is signal.SIGINT else -number)
    assert "Traceback" not in out + err
    until = time.monotonic() + 5
    while time.monotonic() < until and session(process.pid):
        time.sleep(0.1)
    assert session(process.pid) == []


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_damaged_file_is_refused_without_waiting(tmp_path, monkeypatch):
    """A table that cannot be created is a reason to wait only where another process may be creating it."""
    open_database(str(tmp_path / "s.db"), 30)
    refuse = "CREATE TRIGGER refuse BEFORE INSERT ON alembic_version BEGIN SELECT RAISE(FAIL, 'UNIQUE'); END"
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute(refuse)
        database.execute("DELETE FROM alembic_version")
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with pytest.raises(StudyError, match="UNIQUE"):
        open_database(str(tmp_path / "s.db"), 30)
    assert waited == []


def test_a_damaged_row_is_a_study_error(tmp_path):
    tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1))
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute("UPDATE trial_user_attributes SET value_json = '[true]' WHERE key = 'low'")
    with pytest.raises(StudyError, match="of trial 0 is not a valid part of a study"):
        tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1))
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute("UPDATE study_user_attributes SET value_json = '{\"epochs\": \"two\"}' WHERE key = 'settings'")
    with pytest.raises(StudyError, match="epochs"):
        tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1))
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db")) as database, database:
        database.execute("UPDATE trials SET state = 'NONSENSE'")
    with pytest.raises(StudyError, match="cannot be read or written"):
        tune(make_task, storage=tmp_path / "s.db", options=StudyOptions(trials=1))


@pytest.mark.parametrize(("caller", "is_of_storage"), [(optuna, True), (assign, False)])
def test_only_the_folders_of_optuna_and_of_this_package_tell_whose_error_it_is(caller, is_of_storage):
    """A library may lie in a folder that is called like this package, such as the environment of a checkout."""
    names = {}
    exec(compile("def read(): raise KeyError('state')", f"{os.sep}srv{os.sep}assign{os.sep}library.py", "exec"), names)
    exec(compile("def call(): read()", str(Path(caller.__file__).parent / "storage.py"), "exec"), names)
    with pytest.raises(StudyError if is_of_storage else KeyError), explained("s.db"):
        names["call"]()
