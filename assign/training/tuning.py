"""Search by training: every trial of an Optuna study trains briefly under its own plan.

A study is stored in a database. All processes that use the same study share its trials, on one machine or several. If a
process is killed, another one notices and repeats its running trial.

Under a budget there is one objective, the metric. A plan that does not fit gets more low groups, the largest first,
until it fits, and trials that fall behind are pruned (Hyperband). Without a budget there are two objectives, the metric
and peak memory, and the result is their Pareto front.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.study import MaxTrialsCallback, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from assign.errors import AssignError, StudyError, suggest
from assign.notebook import Drawn, frame, human_bytes, table_html
from assign.options import accept_former, option
from assign.plan.plan import Assignment
from assign.plan.table import check_same_model
from assign.tasks import Task
from assign.training.database import check_storage, exclusive, explained, open_database
from assign.training.trials import Outcome, Settings, Trainer

SAMPLERS = ("tpe", "nsga2")
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_PATIENCE = 3.0  # seconds to wait for helpers to end


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Plan that a study has trained.

    Attributes:
        metric: of the trained model.
        costs: its estimate, as in the provenance of a plan, ``peak_bytes`` included.
        trial: number of its trial in the study.
    """

    plan: Assignment
    metric: float
    peak_bytes: int
    trial: int
    costs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned(Drawn):
    """Result of a study.

    Attributes:
        metric: name of the metric that the study optimizes.
        front: Pareto front of metric and peak, the smallest peak first; under a budget only the plan with the best
            metric.
        trained: number of trials trained to the end.
        pruned: number of trials stopped because they fell behind or diverged.
    """

    metric: str
    front: tuple[Candidate, ...]
    trained: int
    pruned: int

    def to_pandas(self) -> Any:
        """Return a data frame with one row per plan of the front: trial, metric and estimate. Needs pandas."""
        return frame({"trial": each.trial, self.metric: each.metric, **each.costs} for each in self.front)

    def _repr_html_(self) -> str:
        """Return the front as an HTML table, for a notebook."""
        most = max((each.peak_bytes for each in self.front), default=1)
        rows = [
            ((f"{each.trial}", f"{each.metric:.4g}", human_bytes(each.peak_bytes)), each.peak_bytes / most)
            for each in self.front
        ]
        title = f"Pareto front of {len(rows)} plans; {self.trained} trained, {self.pruned} stopped early"
        return table_html(title, ["trial", self.metric, "peak"], rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyOptions:
    """How a study is done; processes of one study may use different values.

    Attributes:
        trials: Number of trials in the study, those of earlier calls and other processes included.
        workers: Number of processes on this machine, this one included.
        sampler: ``tpe`` or ``nsga2``. Default: TPE with a budget, NSGA-II for a front.
        name: Name of the study in the database.
        heartbeat: Seconds between two signs of life of a running trial. After two intervals without one, another
            process repeats the trial.
    Raises:
        StudyError: there is no trial, no worker, or no such sampler.
    """

    trials: int = 32
    workers: int = 1
    sampler: str | None = None
    name: str = field(default="assign", metadata=option(hidden=True))
    heartbeat: int = field(default=30, metadata=option(hidden=True))

    def __post_init__(self) -> None:
        if self.trials < 1 or self.workers < 1:
            raise StudyError(f"tune: trials is {self.trials} and workers is {self.workers}. Give at least 1 for each.")
        if self.sampler is not None and self.sampler not in SAMPLERS:
            close = suggest(self.sampler, SAMPLERS)
            raise StudyError(
                f"tune: there is no sampler {self.sampler!r}{f', did you mean {close}' if close else ''}. "
                f"Choose one of: {', '.join(SAMPLERS)}."
            )


@accept_former(options=StudyOptions)
def tune(
    make_task: Callable[[int], Task],
    *,
    storage: str | Path,
    settings: Settings | None = None,
    options: StudyOptions | None = None,
    starts: Sequence[Assignment] = (),
    on_trial: Callable[[FrozenTrial], None] | None = None,
) -> Tuned:
    """Start or resume a study until ``options.trials`` of its trials are done.

    Greedy plans of several low ratios and the ``starts`` are tried first.

    Args:
        make_task: seed → task. It is pickled if there are several workers.
        storage: a file (SQLite), or the URL of a database, e.g. ``postgresql://user@host/name``.
        settings: of all trials. Default: those of the study, or ``Settings()``.
        options: number of trials and of workers, and sampler.
        starts: plans to try, in the recipe's two formats, with the same format for a whole group.
        on_trial: called with every trial that this process has done.
    Returns:
        The best plan under a budget, or the Pareto front of metric and peak.
    Raises:
        StudyError: the storage cannot be used, the task has no such metric, or the study has other settings or is for
            another model.
        BudgetError: the plan with everything low exceeds the budget.
        TaskError: the task cannot be used.
        TraceError: as for :func:`assign.trace`.
        PlanError: as for :func:`assign.apply`.
    Source: Optuna (Akiba et al., 2019); NSGA-II (Deb et al., 2002); Hyperband (Li et al., 2018).
    """
    options = options or StudyOptions()
    job = _Job(make_task, check_storage(storage), options)
    with explained(job.storage), job.opened(settings, starts) as (trainer, study):
        helpers: list[multiprocessing.process.BaseProcess] = []
        try:
            helpers += (_start(job, options.workers) for _ in range(1, options.workers))
            job.work(trainer, study, on_trial)
        except BaseException:
            for helper in helpers:
                helper.terminate()  # its trial will be proposed again
            _join(helpers, _PATIENCE)
            raise
        _join(helpers, None)
        return _result(trainer, study)


@dataclass(frozen=True, slots=True)
class _Job:
    """The work of every process of one call of :func:`tune`; pickled for the other processes."""

    make_task: Callable[[int], Task]
    storage: str
    options: StudyOptions

    @contextlib.contextmanager
    def opened(
        self, settings: Settings | None, starts: Sequence[Assignment] | None = None
    ) -> Iterator[tuple[Trainer, optuna.Study]]:
        """Open the study and its trainer; the connection to the database is closed afterwards.

        Args:
            settings: of all trials; None: those of the study.
            starts: plans to try after the greedy ones, before the sampler proposes any. None: another process enqueues
                them.
        """
        with _quiet():
            storage = open_database(self.storage, self.options.heartbeat)
        try:
            trainer = Trainer.make(self.make_task, _agreed(storage, self.options.name, settings))
            with exclusive(self.storage):
                # another process may have begun the study meanwhile
                _agreed(storage, self.options.name, trainer.settings)
                study = _study(trainer, storage, self.options.name, self.options.sampler)
                if starts is not None:
                    trainer.enqueue(study, starts)
            yield trainer, study
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def work(
        self, trainer: Trainer, study: optuna.Study, on_trial: Callable[[FrozenTrial], None] | None = None
    ) -> None:
        """Do trials until all processes of the study together have done enough."""
        if len(study.get_trials(deepcopy=False, states=_DONE)) >= self.options.trials:
            return
        callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [
            MaxTrialsCallback(self.options.trials, states=_DONE)
        ]
        if on_trial is not None:
            callbacks.append(lambda _study, trial: on_trial(trial))
        with _quiet():
            study.optimize(trainer.objective, callbacks=callbacks)


def _start(job: _Job, workers: int) -> multiprocessing.process.BaseProcess:
    """Start another process that does trials, and return it.

    It ignores Ctrl-C, which a terminal sends to all processes; this process ends it.
    """
    threads = max(1, torch.get_num_threads() // workers)
    process = multiprocessing.get_context("spawn").Process(target=_help, args=(job, threads), daemon=True)
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        process.start()
        return process
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    return process


def _join(helpers: Sequence[multiprocessing.process.BaseProcess], seconds: float | None) -> None:
    """Wait until the helpers have ended; after ``seconds``, kill them."""
    deadline = None if seconds is None else time.monotonic() + seconds
    for helper in helpers:
        helper.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if helper.is_alive():
            helper.kill()
            helper.join()


def _help(job: _Job, threads: int) -> None:
    """Do trials of a study that another process started."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that its trial is proposed again
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with explained(job.storage), job.opened(None) as (trainer, study):
            job.work(trainer, study)
    except KeyboardInterrupt:
        sys.exit(1)
    except AssignError as error:
        sys.exit(f"error in a worker: {error}")


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, for whatever reason."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Optuna's warnings about experimental features and its log of errors in the context.

    Errors are raised anyway.
    """
    logger = logging.getLogger("optuna.study._optimize")
    logger.addFilter(_is_no_failure)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        logger.removeFilter(_is_no_failure)


def _is_no_failure(record: logging.LogRecord) -> bool:
    return record.levelno < logging.WARNING


def _agreed(storage: RDBStorage, name: str, settings: Settings | None) -> Settings:
    """Return the settings of the study if it exists, else ``settings``; check that they do not differ."""
    known = {summary.study_name: summary for summary in optuna.get_all_study_summaries(storage)}
    if name not in known:
        return settings or Settings()
    kept = Settings.of(name, known[name].user_attrs)
    if settings is not None and settings != kept:
        raise StudyError(
            f"tune: the study {name!r} has other settings: "
            + "; ".join(f"{key} is {own!r}, requested {other!r}" for key, own, other in _differences(kept, settings))
            + ".\n  Use the settings of the study, or give another name or storage."
        )
    return kept


def _differences(kept: Any, requested: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, other value) for each field in which two objects differ, nested dataclasses included."""
    for each in dataclasses.fields(kept):
        own, other = getattr(kept, each.name), getattr(requested, each.name)
        if dataclasses.is_dataclass(own):
            yield from _differences(own, other)
        elif own != other:
            yield each.name, own, other


def _study(trainer: Trainer, storage: RDBStorage, name: str, sampler: str | None) -> optuna.Study:
    """Return the study called ``name``; create it if it does not exist.

    Raises:
        StudyError: it belongs to another model.
    """
    chosen = sampler or ("tpe" if trainer.budget is not None else "nsga2")
    direction = StudyDirection.MAXIMIZE if trainer.settings.maximize else StudyDirection.MINIMIZE
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        load_if_exists=True,
        directions=[direction] if trainer.budget is not None else [direction, StudyDirection.MINIMIZE],
        pruner=optuna.pruners.HyperbandPruner() if trainer.budget is not None else optuna.pruners.NopPruner(),
    )
    mine = trainer.table.fingerprint
    fingerprint = study.user_attrs.get("fingerprint", mine)
    check_same_model(
        fingerprint,
        mine,
        what=f"tune: the study {name!r} belongs to another model",
        advice="Give another name or storage, or the task of the study.",
        error=StudyError,
    )
    study.set_user_attr("fingerprint", mine)
    study.set_user_attr("settings", dataclasses.asdict(trainer.settings))
    study.sampler = _sampler(chosen, trainer.settings.seed + len(study.get_trials(deepcopy=False)))
    return study


def _result(trainer: Trainer, study: optuna.Study) -> Tuned:
    """Return the result of the study so far."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = {}
    for trial in reversed(study.best_trials) if done else ():
        outcome = Outcome.of(trial)
        if unknown := set(outcome.low) - trainer.everything:
            raise StudyError(
                f"tune: trial {trial.number} of the study {study.study_name!r} has a group {min(unknown)} low, but the "
                f"model has groups 0 to {max(trainer.everything)}. Give another storage, or start another study."
            )
        best[outcome.low] = trial.number, outcome
    found = [
        Candidate(
            plan=trainer.plan(low),
            metric=outcome.metric,
            peak_bytes=outcome.peak_bytes,
            trial=number,
            costs=trainer.costs(low),
        )
        for low, (number, outcome) in best.items()
    ]
    found.sort(key=lambda each: (each.peak_bytes, each.trial))
    return Tuned(
        metric=trainer.settings.metric,
        front=tuple(found[:1] if trainer.budget is not None else found),
        trained=len(done),
        pruned=len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))),
    )


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
