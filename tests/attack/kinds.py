"""Every kind of file that the package reads: whole ones, how they are damaged, loaded and used."""

import contextlib
import functools
import gzip
import io
import json
import math
import pickle
import random
import sqlite3
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import optuna
import torch
from damage import RAW, VALUES, change_value, damage_bytes, damage_json
from torch import nn
from typer.main import get_command

import assign
from assign.cli import app, origin
from assign.cli import inspect as looking
from assign.cli import search as searching
from assign.errors import AssignError, StudyError
from assign.memory.estimate import estimate
from assign.pareto import Front
from assign.plan.noise_table import Cell, Method, NoiseTable, Sample
from assign.plan.plan import Assignment, Provenance
from assign.plan.space import SearchSpace
from assign.plan.table import TensorTable
from assign.planner import search_table
from assign.report import pictures, tables
from assign.report.page import page
from assign.report.page.runs import load_runs
from assign.report.terminal import Terminal
from assign.tasks.data import read_cifar, read_fashion_mnist
from assign.training import trials
from assign.training.comparison import Comparison, Run, VariantRow
from assign.training.loop import train
from assign.training.options import TrainOptions
from assign.training.trials import Settings
from assign.training.tuning import StudyOptions, tune
from assign.training.weights import load_weights


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))


def make_task() -> assign.Task:
    """A task small enough to be trained in a moment."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(4, 8, generator=generator), torch.arange(4) % 3) for _ in range(2)]
    return assign.Task(
        model=_model,
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        train=data,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
        evaluate=lambda model: {"accuracy": float((model(data[0][0]).argmax(-1) == data[0][1]).float().mean())},
        epochs=2,
        name="small",
    )


class Refused(Exception):
    """What a command did that no file may make it do."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Attributes:
        name, suffix: of its files.
        whole: contents that today's code wrote.
        damage: content and generator → another content.
        load: reads a file, or raises an ``AssignError``.
        use: everything else that takes such a file; gets its path and what was loaded.
        train: a training with what was loaded: for one file in fifty, and unwatched, because Dynamo executes code.
        share: of all files of a run of this attack.
    """

    name: str
    suffix: str
    whole: tuple[bytes, ...]
    damage: Callable[[bytes, random.Random], bytes]
    load: Callable[[Path], Any]
    use: Callable[[Path, Any], None]
    share: int
    train: Callable[[Any], None] | None = None


class Subjects:
    """The task, its table and its files, made once; ``folder`` is where commands may write."""

    def __init__(self, folder: Path) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.folder, self.task = folder, make_task()
        self.table = assign.trace(self.task.make_model(), self.task.first_batch(), self.task.loss, self.task.optimizer)
        self.plan = search_table(self.table, low_ratio=0.5, space="native")
        self._used = 0
        self.plan_file = folder / "whole.json"
        self.plan.save(self.plan_file)
        self._patch()

    def _patch(self) -> None:
        """Commands take this task, and what they build is built once: to do it for each file would take a second."""
        for module in (looking, origin, searching):
            for name, value in (("open_task", self.task), ("traced", self.table)):
                if hasattr(module, name):
                    setattr(module, name, lambda *_, _value=value, **__: _value)
        trials.trace = lambda *_, **__: self.table
        self._command = get_command(app)
        origin.get_group = functools.cache(lambda _: self._command)
        parsed: dict[str, Any] = {}
        compile_template = jinja2.Environment.compile
        jinja2.Environment.compile = lambda environment, source, name=None, *rest, **more: (
            compile_template(environment, source, name, *rest, **more)
            if name is None
            else parsed.setdefault(name, parsed.get(name) or compile_template(environment, source, name, *rest, **more))
        )
        library = page._library
        page._library = lambda name: _NoPlotly if name == "plotly.offline" else library(name)

    def kinds(self) -> Iterator[Kind]:
        """All of them."""

        def of_json(name: str, *whole: Any, **others: Any) -> Kind:
            """Return a kind of JSON files; ``whole``: the data of valid ones."""
            texts = tuple(json.dumps(data).encode() for data in whole)
            return Kind(name=name, suffix=".json", whole=texts, damage=_mixed(damage_json), **others)

        plans = [json.loads(plan.to_json()) for plan in self._plans()]
        yield of_json("plan", *plans, share=30, load=Assignment.load, use=self._use_plan, train=self._train)
        yield of_json("front", *plans, share=8, load=self._front, use=self._use_front)
        noise = json.loads(self._noise().to_json())
        yield of_json("noise", noise, share=16, load=NoiseTable.load, use=self._use_noise)
        yield of_json("table", self.table.to_json(), share=16, load=TensorTable.load, use=self._use_table)
        result = train(self.task, self.plan, table=self.table).to_json()
        both = {"baseline": train(self.task).to_json(), "plan": result, "search": {}}
        fingerprint = self.table.fingerprint
        yield of_json(
            "run", result, both, share=10, load=lambda path: load_runs([path], fingerprint), use=self._use_run
        )
        comparison = self._comparison(result).to_json()
        yield of_json("comparison", comparison, share=10, load=Comparison.load, use=self._use_comparison)
        train(self.task, self.plan, options=TrainOptions(checkpoint=self.folder / "run.pt", epochs=1))
        yield Kind(
            name="checkpoint",
            suffix=".pt",
            whole=((self.folder / "run.pt").read_bytes(),),
            damage=_mixed(_damage_state),
            load=lambda path: train(self.task, self.plan, options=TrainOptions(checkpoint=path, resume=True, epochs=1)),
            use=lambda path, _: load_weights(path, _model()),
            share=6,
        )
        storage = self.folder / "study.db"
        tune(lambda _: self.task, storage=storage, options=StudyOptions(trials=2), settings=Settings(epochs=1))
        yield Kind(
            name="study", suffix=".db", whole=(storage.read_bytes(),), damage=_mixed(self._damage_study),
            load=self._study, use=_nothing, share=6,
        )  # fmt: skip
        yield from self._data()

    # ---- whole files

    def _plans(self) -> Iterator[Assignment]:
        facts = Provenance(
            command="assign search digits --low-ratio 0.5",
            versions={"torch": "2"},
            seed=0,
            strategy="milp",
            estimate={"peak_bytes": 1, "noise": 0.5, "low_ratio": 0.5, "by_greedy": False, "trained_accuracy": 0.5},
        )
        yield self.plan.with_provenance(facts)
        for options in (
            {"recipe": "bf16", "master": "bf16", "gradients": "bf16", "optimizer_states": "bf16"},
            {"recipe": "native-delayed"},
            {"recipe": "hfp8", "saved": "int4:block64"},
        ):
            yield search_table(self.table, low_ratio=1.0, space=SearchSpace(**options))

    def _noise(self) -> NoiseTable:
        cells = {}
        for row in self.table.paper_tensors:
            for name in ("bf16", "e4m3:pow2", "e5m2:pow2"):
                cells[Cell(row.key, name)] = (Sample(1e-4, 0.99, 0.0), Sample(2e-4, 1.0, -1e-6))
        return NoiseTable(fingerprint=self.table.fingerprint, method=Method.MEASURED, cells=cells)

    def _comparison(self, result: dict[str, Any]) -> Comparison:
        rows = [VariantRow(name=name, plan=plan, recipe="native", strategy="greedy", promote_every=0)
                for name, plan in (("fp32", None), ("low", "0123"))]  # fmt: skip
        runs = [
            Run(
                variant=row.name, seed=seed, low_ratio=row.plan and 0.5, low_ratio_bits=row.plan and 0.4,
                final_low_ratio=row.plan and 0.5, final_low_ratio_bits=row.plan and 0.4, result=result, hardware="cpu",
            )
            for row in rows for seed in (0, 1)
        ]  # fmt: skip
        return Comparison(
            task="small", fingerprint=self.table.fingerprint, elements=10, epochs=2, backend="eager", device="cpu",
            versions={"torch": "2"}, created="", seeds=(0, 1), variants=tuple(rows), runs=tuple(runs),
        )  # fmt: skip

    def _data(self) -> Iterator[Kind]:
        draw = np.random.default_rng(0)
        pixels = draw.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": [0, 1, 2, 99], "filenames": ["a", "b", "c", "d"]}
        arrays = {"delta": pixels.reshape(3, 4, 32, 32), "labels": np.arange(4, dtype=np.uint8)}
        pickles = tuple(pickle.dumps(content, protocol=protocol) for protocol in (0, 2, 4, 5))
        yield Kind(
            name="pickle", suffix="", whole=pickles, damage=damage_bytes, load=self._cifar, use=_nothing, share=5
        )
        yield Kind(
            name="npz", suffix=".npz", whole=(_npz(arrays),),
            damage=_mixed(_damage_archive), load=self._archives, use=_nothing, share=4,
        )  # fmt: skip
        images = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(2 * 28 * 28)
        yield Kind(
            name="idx", suffix="", whole=(images, gzip.compress(images)), damage=damage_bytes, load=self._idx,
            use=_nothing, share=3,
        )  # fmt: skip

    # ---- what takes them

    def _cifar(self, path: Path) -> Any:
        return read_cifar(
            self._laid_out("pickle", {"cifar-100-python/train": path, "cifar-100-python/test": path}), 100
        )

    def _archives(self, path: Path) -> Any:
        return read_cifar(self._laid_out("npz", {"cifar10-train.npz": path, "cifar10-test.npz": path}), 10)

    def _idx(self, path: Path) -> Any:
        content = path.read_bytes()
        end = ".gz" if content[:2] == b"\x1f\x8b" else ""
        labels = self.folder / f"labels{end}"
        plain = bytes([0, 0, 8, 1, 0, 0, 0, 2, 0, 1])
        labels.write_bytes(gzip.compress(plain) if end else plain)
        names = {f"{part}-images-idx3-ubyte{end}": path for part in ("train", "t10k")}
        return read_fashion_mnist(
            self._laid_out(f"idx{end}", names | {f"{p}-labels-idx1-ubyte{end}": labels for p in ("train", "t10k")})
        )

    def _laid_out(self, name: str, files: dict[str, Path]) -> Path:
        root = self.folder / f"data-{name}"
        for place, path in files.items():
            target = root / place
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_symlink():
                target.symlink_to(path)
        return root

    def command(self, *arguments: str) -> None:
        """Run a command; it may refuse, but only as it refuses what a user does wrong."""
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            _allowed(lambda: self._command.main([*arguments], standalone_mode=False))
        for character in "\x1b\x9b\x00\x07\u202e":
            if character in output.getvalue():
                raise Refused(f"{arguments[0]} printed {character!r}")

    def first(self) -> None:
        """Whole files come next: do with them what takes long, too, so that all that is needed is imported."""
        self._used = 0
        Terminal(file=io.StringIO()).print("日本")  # rich imports the widths of such characters when it meets one

    def _rarely(self) -> bool:
        """One in fifty, and the first of all: whole files, which do everything once."""
        self._used += 1
        return self._used < 20 or self._used % 50 == 0

    def _use_plan(self, path: Path, plan: Assignment) -> None:
        again = self.folder / "again.json"
        plan.save(again)
        if Assignment.load(again) != plan:
            raise Refused("saved and loaded again it is another plan")
        task, out = ("--task", "any:task"), str(self.folder / "out.json")
        for more in ((), ("--all",), ("--lowered",)):
            self.command("show", str(path), *more, *task, "--json", out)
        self.command("diff", str(path), str(self.plan_file), "--json", out)
        self.command("estimate", "any:task", "--plan", str(path), "--json", out)
        self.command("report", str(path), *task, "-o", str(self.folder / "page.html"))
        plan._repr_html_()

    def _train(self, plan: Assignment) -> None:
        _allowed(lambda: train(self.task, plan, options=TrainOptions(epochs=1, backend="eager")))

    def _front(self, path: Path) -> Front:
        front = self.folder / "read front"
        front.mkdir(exist_ok=True)
        (front / "a.json").write_bytes(path.read_bytes())
        self.plan.save(front / "b.json")
        return Front.load(front)

    def _use_front(self, _: Path, front: Front) -> None:
        front._repr_html_()
        folder = str(self.folder / "read front")
        self.command("search", "any:task", "--front", folder, "--budget", "1MB", "-o", str(self.folder / "out.json"))
        self.command("report", str(self.plan_file), "--task", "any:task", "--front", folder, "-o",
                     str(self.folder / "page.html"))  # fmt: skip

    def _study(self, path: Path) -> Any:
        """Resume a study of two trials; one that has lost them would train, and is refused instead."""

        def refuse(*_: Any, **__: Any) -> Any:
            raise StudyError("no training here")

        trained, trials.train = trials.train, refuse
        try:
            return tune(lambda _: self.task, storage=path, options=StudyOptions(trials=2))
        finally:
            trials.train = trained

    def _damage_study(self, content: bytes, draw: random.Random) -> bytes:
        """A study with one cell, row or table changed; SQLite accepts the file."""
        path = self.folder / "changed.db"
        path.write_bytes(content)
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            filled = [each for each in tables if database.execute(f"SELECT count(*) FROM {each}").fetchone()[0]]
            table = draw.choice(filled)
            names = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            rows = [row for (row,) in database.execute(f"SELECT rowid FROM {table}")]
            value, kind = draw.choice(VALUES), draw.randrange(10)
            with contextlib.suppress(sqlite3.IntegrityError, OverflowError):
                if kind == 0:
                    database.execute(f"DROP TABLE {table}")
                elif kind == 1:
                    database.execute(f"DELETE FROM {table} WHERE rowid = ?", (draw.choice(rows),))
                else:
                    written = value if kind < 5 and isinstance(value, str) else json.dumps(value)
                    written = draw.choice([*RAW.values()]) if kind == 9 else written
                    place = draw.choice(names), draw.choice(rows)
                    database.execute(f"UPDATE {table} SET {place[0]} = ? WHERE rowid = ?", (written, place[1]))
        return path.read_bytes()

    def _use_noise(self, path: Path, noise: NoiseTable) -> None:
        again = self.folder / "again.json"
        noise.save(again)
        if NoiseTable.load(again) != noise:
            raise Refused("saved and loaded again it is another table")
        for samples in noise.cells.values():
            for each in samples:
                if not (each.gradient >= 0 and all(map(math.isfinite, (each.gradient, each.cosine, each.loss)))):
                    raise Refused(f"a sample is {each}")
        out = str(self.folder / "out.json")
        self.command("search", "any:task", "--strategy", "milp", "--low-ratio", "0.5", "--noise", str(path), "-o", out)
        self.command("report", str(self.plan_file), "--task", "any:task", "--noise", str(path), "-o", f"{out}.html")
        noise._repr_html_()
        _allowed(noise.to_pandas)

    def _use_table(self, _: Path, table: TensorTable) -> None:
        again = self.folder / "again.json"
        table.save(again)
        if TensorTable.load(again) != table:
            raise Refused("saved and loaded again it is another table")
        table.to_networkx()
        table._repr_html_()
        found = _allowed(lambda: search_table(table, low_ratio=0.5))
        if found is not None:
            _allowed(lambda: estimate(table, found).to_json())
            json.dumps(estimate(table, found).to_json(), allow_nan=False)

    def _use_run(self, path: Path, _: Any) -> None:
        page_file = str(self.folder / "page.html")
        self.command("report", str(self.plan_file), "--task", "any:task", "--run", str(path), "-o", page_file)

    def _use_comparison(self, path: Path, comparison: Comparison) -> None:
        again = self.folder / "again.json"
        comparison.save(again)
        if Comparison.load(again) != comparison:
            raise Refused("saved and loaded again it is another comparison")
        Terminal(file=io.StringIO()).print(tables.comparison_table(comparison))
        self._use_run(path, None)
        if self._rarely():  # pictures take a tenth of a second
            pictures.draw(comparison, (self.folder / "a.svg", self.folder / "b.svg"), required=False)


class _NoPlotly:
    """In the place of plotly, whose four megabytes are packed into each page."""

    @staticmethod
    def get_plotlyjs() -> str:
        return ""


def _nothing(*_: Any) -> None:
    """No command takes it but the one that loaded it."""


def _allowed(call: Callable[[], Any]) -> Any:
    """What a call returns; None where it refuses, as a user is refused."""
    try:
        return call()
    except AssignError:
        return None


def _mixed(change: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """A third of all damage is to bytes; the rest knows the kind of file."""
    return lambda content, draw: damage_bytes(content, draw) if draw.random() < 0.33 else change(content, draw)


def _damage_state(content: bytes, draw: random.Random) -> bytes:
    """A checkpoint with one value of another kind in it; whole as a file."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    raw: dict[str, str] = {}
    changed = change_value(state, draw, raw)
    if draw.random() < 0.3:
        changed = {**changed, draw.choice([*state] or ["model"]): torch.zeros(draw.choice((0, 1, 3)))}
    file = io.BytesIO()
    torch.save(changed, file)
    return file.getvalue()


def _npz(arrays: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def _damage_archive(content: bytes, draw: random.Random) -> bytes:
    """A NumPy archive whose parts are damaged, and whose checksums are right again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        hit = draw.choice(old.namelist())
        for name in old.namelist():
            part = old.read(name)
            if name == hit:
                head = part[:128]
                value = str(draw.choice(VALUES)).encode("utf-8", "replace")[:20]
                for piece in (b"(3, 4, 32, 32)", b"|u1", b"False", b"(4,)"):
                    if piece in head and draw.random() < 0.5:
                        other = draw.choice((b"(2**40,)", b"(-1,)", b"|O8", b"<f8", b"True", b"(0,)", value))
                        head = head.replace(piece, other)
                part = damage_bytes(part, draw) if head == part[:128] else head + part[128:]
            new.writestr(name, part)
    return file.getvalue()
