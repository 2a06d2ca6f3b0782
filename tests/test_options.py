"""Options that are declared once: former keywords, the help of the shell, and the objects that commands get."""

import contextlib
import importlib
import inspect
import re
import warnings
from dataclasses import dataclass, field, fields
from typing import Annotated

import pytest
import typer
from models import MLP, class_loss, vectors
from typer.testing import CliRunner

import assign
from assign.cli import app
from assign.cli.groups import expand_groups, without
from assign.errors import AssignError, BudgetError, FormatError, PlanError, StudyError, TaskError
from assign.noise.options import WARM_UP
from assign.options import accept_former, help_of, nested, option, shell_of
from assign.plan.space import Granularity
from assign.planner import Request, search_table
from assign.strategies import METHODS, check_request
from assign.strategies.goal import Goal
from assign.training.trials import Settings
from assign.training.tuning import StudyOptions

GROUPS = (
    assign.SearchSpace,
    assign.NoiseOptions,
    assign.PromotionOptions,
    assign.TrainOptions,
    StudyOptions,
    Settings,
    Goal,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Options inside others.

    Attributes:
        look: Steps between
            two looks.
    """

    look: int = field(default=3, metadata=option("--look-every", former=("look_every",)))


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Options.

    Attributes:
        name: A name, e.g. ``a``.
        hidden: Not offered.
        inner: Options inside.
    """

    name: str = "a"
    hidden: int = field(default=0, metadata=option(hidden=True))
    inner: Inner = field(default_factory=Inner)


@accept_former("dropped", outer=Outer)
def use(first: int, *, outer: Outer | None = None) -> tuple[int, Outer | None]:
    """Return what was given."""
    return first, outer


def test_former_keywords_build_the_object_and_name_the_new_spelling() -> None:
    with pytest.warns(FutureWarning, match=r"assign.use: name=, look_every= .* Write outer=") as caught:
        found = use(1, name="b", look_every=5)
    assert found == (1, Outer(name="b", inner=Inner(look=5)))
    assert "outer=Outer(name=…, inner=Inner(look=…))" in str(caught[0].message)
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="dropped= is not needed") as caught:
        assert use(1, dropped=3) == (1, None)
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="name= has no effect together with outer="):
        assert use(1, outer=7, name="b") == (1, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use(2, outer=Outer(name="c")) == (2, Outer(name="c"))


def test_former_keywords_beside_the_object_and_unknown_ones_are_refused() -> None:
    with pytest.raises(AssignError, match=r"outer= and name= are both given.\n.*\n  Write outer=assign.*|Outer\(name"):
        use(1, outer=Outer(), name="b")
    with pytest.raises(TypeError, match="look"):
        use(1, look=5)  # a field with a former name is not taken by its new one
    assert list(inspect.signature(use).parameters) == ["first", "outer"]


@pytest.mark.parametrize(
    ("function", "former", "spelled"),
    [
        (lambda **asked: assign.search(MLP(), vectors(), class_loss, **asked), {"recipe": "bf16"}, "space=SearchSpace"),
        (lambda **asked: assign.measure_noise(MLP(), [vectors()], class_loss, **asked), {"most": 1}, "max_batches="),
        (lambda **asked: assign.measure_times(MLP(), vectors(), class_loss, **asked), {"saved": ["int3"]}, "saved="),
        (lambda **asked: search_table(None, **asked), {"format_name": "bf16"}, "formats="),
        (lambda **asked: assign.search_front(None, 1, **asked), {"noise": None}, "measured=Measured"),
        (lambda **asked: assign.tune(None, storage="/", **asked), {"trials": 1}, "options=StudyOptions"),
        (lambda **asked: assign.train(None, **asked), {"promote_every": 1}, "promotion=PromotionOptions"),
        (lambda **asked: assign.compare(None, [], seeds=[], **asked), {"device": "cpu"}, "options=TrainOptions"),
    ],
)
def test_every_function_takes_its_former_keywords(function, former, spelled) -> None:
    def attempt() -> None:
        with contextlib.suppress(AssignError, AttributeError, TypeError):  # what it goes on with makes no sense
            function(**former)

    with pytest.warns(FutureWarning, match=re.escape(spelled)):
        attempt()


@pytest.mark.parametrize("options", GROUPS, ids=lambda options: options.__name__)
def test_every_option_is_documented(options) -> None:
    wanted = {each.name for each in fields(options)}
    assert wanted <= help_of(options).keys()
    assert "``" not in "".join(help_of(options).values())


def test_a_command_gets_the_objects_that_its_options_build() -> None:
    seen, small = [], typer.Typer()

    @small.command()
    @expand_groups
    def command(
        where: str, outer: Outer, other: Annotated[assign.TrainOptions, without("checkpoint", "weights")]
    ) -> None:
        seen.append((where, outer, other))

    @small.command()
    def second() -> None: ...

    result = CliRunner().invoke(small, ["command", "--help"], catch_exceptions=False)
    for text in ("--name", "--look-every", "Steps between two looks.", "A name, e.g. a."):
        assert text in " ".join(result.output.replace("│", " ").split())
    for text in ("--hidden", "--checkpoint", "--from", "--max-steps"):
        assert text not in result.output
    CliRunner().invoke(small, ["command", "x"], catch_exceptions=False)
    CliRunner().invoke(
        small, ["command", "x", "--name", "b", "--look-every", "1", "--seed", "4"], catch_exceptions=False
    )
    assert seen == [
        ("x", Outer(), assign.TrainOptions()),
        ("x", Outer(name="b", inner=Inner(look=1)), assign.TrainOptions(seed=4)),
    ]


def test_an_option_that_two_groups_have_goes_into_both() -> None:
    seen, small = [], typer.Typer()

    @small.command()
    @expand_groups
    def command(first: assign.NoiseOptions, second: assign.TrainOptions) -> None:
        seen.append((first.seed, second.seed))

    CliRunner().invoke(small, ["--seed", "7"], catch_exceptions=False)
    assert seen == [(7, 7)]


def test_two_options_of_one_name_must_be_one_option() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other:
        """Options.

        Attributes:
            look: Something else.
        """

        look: int = 9

    def command(first: Inner, second: Other) -> None: ...

    command.__annotations__ = {"first": Inner, "second": Other}
    with pytest.raises(AssertionError, match="look"):
        expand_groups(command)


def test_python_and_the_shell_have_the_same_defaults() -> None:
    for options in GROUPS:
        built = options()
        small, seen = typer.Typer(), []

        def command(group, seen=seen) -> None:
            seen.append(group)

        command.__signature__ = inspect.Signature(
            [inspect.Parameter("group", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=options)]
        )
        small.command()(expand_groups(command))
        CliRunner().invoke(small, [], catch_exceptions=False)
        assert seen == [built]


def test_a_space_reads_what_the_shell_and_python_write() -> None:
    typed = assign.SearchSpace(formats="bf16, fp(4,3,4)", saved="int4:block64,mxfp8", pins=["a.*=bf16", "b=fp32"])
    assert typed == assign.SearchSpace(
        formats=["bf16", "fp(4,3,4)"], saved=("int4:block64", "mxfp8"), pins={"a.*": "bf16", "b": "fp32"}
    )
    assert typed.granularity is Granularity.GROUP
    assert assign.SearchSpace.of("hfp8") == assign.SearchSpace(recipe="hfp8")
    assert assign.SearchSpace.of(typed) is typed


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: assign.SearchSpace(recipe="hfp9"), FormatError, "Did you mean 'hfp8'"),
        (lambda: assign.SearchSpace(formats="bf17"), FormatError, "bf17"),
        (lambda: assign.SearchSpace(saved="int3"), FormatError, "int3"),
        (lambda: assign.SearchSpace(master="dynamic8"), FormatError, "not allowed for a master"),
        (lambda: assign.SearchSpace(gradients="int4:block64"), FormatError, "int4:block64"),
        (lambda: assign.SearchSpace(pins=["a"]), PlanError, "is not a pin"),
        (lambda: assign.SearchSpace(update_rounding="up"), PlanError, "'up' is not known"),
        (lambda: assign.NoiseOptions(warm_up=-1), PlanError, "0 or more"),
        (lambda: assign.NoiseOptions(max_batches=0), PlanError, "1 batch or more"),
        (lambda: assign.PromotionOptions(every=-1), PlanError, "0 to promote nothing"),
        (lambda: assign.PromotionOptions(threshold=0.0), PlanError, "above 0 and up to 1"),
        (lambda: assign.TrainOptions(resume=True), TaskError, "resume=True needs checkpoint="),
        (lambda: assign.TrainOptions(seed=2**40), TaskError, "seed"),
        (lambda: StudyOptions(trials=0), StudyError, "at least 1 for each"),
        (lambda: StudyOptions(sampler="tpe2"), StudyError, "did you mean 'tpe'"),
        (lambda: Settings(space=assign.SearchSpace(formats="bf16,fp16")), BudgetError, "does not take formats"),
        (lambda: Goal(low_ratio=2.0), BudgetError, "from 0 to 1"),
        (lambda: Goal(budget="much"), BudgetError, "is not a budget"),
        (lambda: Goal(budget=0), BudgetError, "positive number of bytes"),
        (lambda: Goal(max_step_time="soon"), BudgetError, "not a limit"),
    ],
)
def test_options_that_make_no_sense_are_refused_when_they_are_made(make, error, match) -> None:
    with pytest.raises(error, match=match):
        make()


def test_a_goal_is_resolved_against_a_baseline() -> None:
    assert Goal(budget="50%").resolve(1000).budget_bytes == 500
    assert Goal(budget=7).resolve(1000) == Goal(budget=7)
    assert Goal(low_ratio=0.5).resolve(1000).budget_bytes is None
    with pytest.raises(BudgetError, match="positive number of bytes"):
        Goal(budget="0%").resolve(1000)


@pytest.mark.parametrize("strategy", METHODS)
def test_a_strategy_takes_what_its_row_says(strategy) -> None:
    method = METHODS[strategy]
    goals = {"budget": "50%", "low_ratio": 0.5, "max_step_time": "2x"}
    spaces = {"formats": "bf16", "pins": {"*": "bf16"}, "granularity": "tensor", "saved": "int4:block64,int8:block64"}
    for name, value in goals.items():
        if name in method.goals:
            check_request(strategy, Goal(**{name: value}), assign.SearchSpace())
        else:
            with pytest.raises(BudgetError, match=rf"does not take {name}\.\n  {name} requires one of the strategies"):
                check_request(strategy, Goal(**{name: value}), assign.SearchSpace())
    for name, value in spaces.items():
        if name in method.options:
            check_request(strategy, Goal(), assign.SearchSpace(**{name: value}))
        else:
            with pytest.raises(BudgetError, match="requires one of the strategies"):
                check_request(strategy, Goal(), assign.SearchSpace(**{name: value}))
    check_request(strategy, Goal(), assign.SearchSpace(saved="int4:block64", master="bf16", recipe="bf16"))


def test_a_strategy_that_trains_or_does_not_exist_makes_no_request() -> None:
    with pytest.raises(AssignError, match="assign tune TASK"):
        Request(strategy="optuna")
    with pytest.raises(AssignError, match="Did you mean 'greedy'"):
        Request(strategy="gredy")


def test_the_warm_up_is_the_same_in_python_and_in_the_shell() -> None:
    options = assign.NoiseOptions()
    assert (options.steps(trained=False), options.steps(trained=True)) == (WARM_UP, 0) == (40, 0)
    assert assign.NoiseOptions(warm_up=3).steps(trained=True) == 3


def test_no_list_of_options_is_long() -> None:
    """Commands list none; a public function has at most ten parameters."""
    for name in assign.__all__:
        found = getattr(assign, name)
        if inspect.isfunction(found):
            assert len(inspect.signature(found).parameters) <= 10, name
    for command in app.registered_commands:
        own = inspect.signature(inspect.unwrap(command.callback)).parameters
        assert len(own) <= 10, command.callback.__name__


def test_a_hidden_field_says_so() -> None:
    assert shell_of(Outer.__dataclass_fields__["hidden"]).hidden
    assert nested(Outer.__dataclass_fields__["inner"]) is Inner
    assert nested(Outer.__dataclass_fields__["name"]) is None


def test_names_that_moved_warn_and_work():
    assert len(assign.__all__) <= 34
    for name, module in assign._MOVED.items():
        assert name not in assign.__all__
        with pytest.warns(FutureWarning, match=rf"assign\.{name} will be removed .* Write {re.escape(module)}\.{name}"):
            assert getattr(assign, name) is getattr(importlib.import_module(module), name)
