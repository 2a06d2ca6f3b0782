"""Search by training: every trial of an Optuna study is a short training under a plan of its own.

A study lives in a database. All processes that name the same one share its trials, on this machine or on others; one
that is killed loses its running trial, which the others notice, and train again.

Under a budget there is one objective, the metric: a plan that does not fit gets more low groups, the largest first,
until it does, and trials that fall behind are pruned (Hyperband). Without one there are two, the metric and the peak,
and the answer is their Pareto front.
"""

import contextlib
import dataclasses
import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from assign.errors import StudyError, nearest
from assign.plan.assignment import Assignment
from assign.plan.display import Drawn, frame, human_bytes, table_html
from assign.tasks import Task
from assign.training.trials import Settings, Trainer

SAMPLERS = ("tpe", "nsga2")
_DONE = (TrialState.COMPLETE, TrialState.PRUNED)
_MINIMISED = ("loss", "error", "perplexity")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan that was trained.

    Attributes:
        metric: what it came to.
        costs: its estimate, as a plan's provenance has it; ``peak_bytes`` is one of them.
        trial: number of its trial in the study.
    """

    plan: Assignment
    metric: float
    peak_bytes: int
    trial: int
    costs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned(Drawn):
    """What a study came to.

    Attributes:
        metric: name of what was judged by.
        front: the plans that no other beats in both metric and peak, the smallest peak first; under a budget the one
            plan with the best metric.
        trained: trials to the end.
        pruned: trials that were stopped because they fell behind or diverged.
    """

    metric: str
    front: tuple[Candidate, ...]
    trained: int
    pruned: int

    def to_pandas(self) -> Any:
        """A frame with a row for each plan of the front: trial, the metric, and its estimate. Needs pandas."""
        return frame({"trial": each.trial, self.metric: each.metric, **each.costs} for each in self.front)

    def _repr_html_(self) -> str:
        """The front, for a notebook."""
        most = max((each.peak_bytes for each in self.front), default=1)
        rows = [
            ((f"{each.trial}", f"{each.metric:.4g}", human_bytes(each.peak_bytes)), each.peak_bytes / most)
            for each in self.front
        ]
        title = f"{len(rows)} plans that no other beats; {self.trained} trained, {self.pruned} stopped early"
        return table_html(title, ["trial", self.metric, "peak"], rows)


def tune(
    make_task: Callable[[int], Task],
    *,
    storage: str | Path,
    name: str = "assign",
    trials: int = 32,
    settings: Settings | None = None,
    starts: Sequence[Assignment] = (),
    sampler: str | None = None,
    workers: int = 1,
    heartbeat: int = 30,
    on_trial: Callable[[FrozenTrial], None] | None = None,
) -> Tuned:
    """Go on with a study, or begin it, until ``trials`` of its trials are done, and say what it came to.

    Greedy plans of several low ratios are tried first, and the ``starts``.

    Args:
        make_task: seed → the task. With several workers it is pickled.
        storage: a file (SQLite), or the URL of a database, e.g. ``postgresql://user@host/name``.
        name: of the study in it.
        settings: None: those of the study, or the defaults.
        starts: plans to try, of the recipe's two formats, whole groups alike.
        sampler: ``tpe`` or ``nsga2``; None: TPE under a budget, NSGA-II for a front.
        workers: processes here, this one included.
        heartbeat: seconds between two signs of life of a running trial; after two without, another process repeats it.
        on_trial: told of every trial that this process has done.
    Raises:
        StudyError: the storage cannot be used, the task has no such metric, or the study has other settings or is of
            another model.
        BudgetError: all low is still over the budget.
        TaskError: the task cannot be used.
        TraceError: as :func:`assign.trace`.
        PlanError: as :func:`assign.apply`.
    Source: Optuna (Akiba et al., 2019); NSGA-II (Deb et al., 2002); Hyperband (Li et al., 2018).
    """
    if trials < 1 or workers < 1:
        raise StudyError(f"tune: {trials} trials by {workers} workers are asked for. Give at least one of each.")
    job = _Job(make_task, _url(storage), name, trials, sampler, heartbeat)
    with job.opened(settings) as (trainer, study):
        trainer.enqueue(study, starts)
        helpers = [_start(job, workers) for _ in range(1, workers)]
        try:
            job.work(trainer, study, on_trial)
        finally:
            for helper in helpers:
                helper.join()
        return _result(trainer, study)


@dataclass(frozen=True, slots=True)
class _Job:
    """What every process of this call does; pickled for the others."""

    make_task: Callable[[int], Task]
    url: str
    name: str
    trials: int
    sampler: str | None
    heartbeat: int

    @contextlib.contextmanager
    def opened(self, settings: Settings | None) -> Iterator[tuple[Trainer, optuna.Study]]:
        """The study, and what trains for it; the database is left behind."""
        storage = _open(self.url, self.heartbeat)
        try:
            trainer = Trainer.make(self.make_task, _agreed(storage, self.name, settings))
            yield trainer, _study(trainer, storage, self.name, self.sampler)
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def work(
        self, trainer: Trainer, study: optuna.Study, on_trial: Callable[[FrozenTrial], None] | None = None
    ) -> None:
        """Do trials until all of the study's processes together have done enough."""
        if len(study.get_trials(deepcopy=False, states=_DONE)) >= self.trials:
            return
        callbacks: list[Callable[[optuna.Study, FrozenTrial], None]] = [MaxTrialsCallback(self.trials, states=_DONE)]
        if on_trial is not None:
            callbacks.append(lambda _study, trial: on_trial(trial))
        with _quiet():
            study.optimize(trainer.objective, callbacks=callbacks)


def _start(job: _Job, workers: int) -> multiprocessing.process.BaseProcess:
    threads = max(1, torch.get_num_threads() // workers)
    process = multiprocessing.get_context("spawn").Process(target=_help, args=(job, threads), daemon=True)
    process.start()
    return process


def _help(job: _Job, threads: int) -> None:
    """A process that does trials of a study that another one began."""
    torch.set_num_threads(threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with job.opened(None) as (trainer, study):
        job.work(trainer, study)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own words on parts of it that may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


def _url(storage: str | Path) -> str:
    text = str(storage)
    if "://" in text:
        return text
    if not Path(text).absolute().parent.is_dir():
        raise StudyError(f"tune: there is no directory for {text}. Make it, or give a file in one that is there.")
    return f"sqlite:///{text}"


def _open(url: str, heartbeat: int) -> RDBStorage:
    """The database.

    Raises:
        StudyError: it cannot be reached, or its driver is not installed.
    """
    try:
        with _quiet():
            return RDBStorage(
                url,
                heartbeat_interval=heartbeat,
                grace_period=2 * heartbeat,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(),
            )
    except ImportError as error:
        raise StudyError(
            f"tune: the driver of the storage {_without_password(url)} is not installed: {error}\n"
            "  For postgresql: pip install 'precision-assign[postgresql]'. Or give a file, which needs no driver."
        ) from error
    except Exception as error:  # whatever the driver raises
        raise StudyError(
            f"tune: the storage {_without_password(url)} cannot be used: {str(error).splitlines()[0]}\n"
            "  Give a file, or the URL of a database that can be reached: postgresql://user:password@host/name."
        ) from error


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}://{login.partition(':')[0]}{at}{place}"


def _agreed(storage: RDBStorage, name: str, settings: Settings | None) -> Settings:
    """The settings of the study, if there is one; they must be those that are asked for."""
    known = {summary.study_name: summary for summary in optuna.get_all_study_summaries(storage)}
    if name not in known:
        return settings or Settings()
    found = dict(known[name].user_attrs.get("settings", {}))
    kept = Settings(**{**found, "stored": tuple((str(k), str(v)) for k, v in found.get("stored", ()))})
    if settings is not None and settings != kept:
        other = [key for key in Settings.__dataclass_fields__ if getattr(kept, key) != getattr(settings, key)]
        raise StudyError(
            f"tune: the study {name!r} has other settings: "
            + "; ".join(f"{key} is {getattr(kept, key)!r}, asked for {getattr(settings, key)!r}" for key in other)
            + ".\n  Go on with its own, or give another name or storage."
        )
    return kept


def _study(trainer: Trainer, storage: RDBStorage, name: str, sampler: str | None) -> optuna.Study:
    """The study called ``name``, made if there is none.

    Raises:
        StudyError: it is of another model, or there is no such sampler.
    """
    chosen = sampler or ("tpe" if trainer.budget is not None else "nsga2")
    if chosen not in SAMPLERS:
        close = nearest(chosen, SAMPLERS)
        raise StudyError(
            f"tune: there is no sampler {chosen!r}{f', did you mean {close}' if close else ''}. "
            f"Choose one of: {', '.join(SAMPLERS)}."
        )
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
    if fingerprint != mine:
        raise StudyError(
            f"tune: the study {name!r} is of another model: its fingerprint is {fingerprint}, this model's {mine}.\n"
            "  Give another name or storage, or the study's own task."
        )
    study.set_user_attr("fingerprint", mine)
    study.set_user_attr("settings", dataclasses.asdict(trainer.settings))
    study.sampler = _sampler(chosen, trainer.settings.seed + len(study.get_trials(deepcopy=False)))
    return study


def _result(trainer: Trainer, study: optuna.Study) -> Tuned:
    """What the study came to so far."""
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    best = {tuple(trial.user_attrs["low"]): trial for trial in reversed(study.best_trials)} if done else {}
    found = [
        Candidate(
            plan=trainer.plan(low),
            metric=trial.user_attrs["metric"],
            peak_bytes=trial.user_attrs["peak_bytes"],
            trial=trial.number,
            costs=trainer.costs(low),
        )
        for low, trial in best.items()
    ]
    found.sort(key=lambda each: (each.peak_bytes, each.trial))
    return Tuned(
        metric=trainer.settings.metric,
        front=tuple(found[:1] if trainer.budget is not None else found),
        trained=len(done),
        pruned=len(study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))),
    )


def is_maximized(metric: str) -> bool:
    """Whether more of a metric is taken to be better: not of what is called a loss, an error or a perplexity."""
    return not any(word in metric.lower() for word in _MINIMISED)


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
