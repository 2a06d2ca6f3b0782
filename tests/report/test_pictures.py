"""Pictures of a comparison: they exist, they say what they show, and nothing is left out."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from comparisons import by_hand, compared
from matplotlib.figure import Figure

from assign.errors import ComparisonError
from assign.report.pictures import (
    accuracy_picture,
    check_picture,
    curves_picture,
    draw,
    picture_paths,
    save_picture,
)
from assign.training.comparison import Comparison

BOTH = (accuracy_picture, curves_picture)


def comparison(**changes: object) -> Comparison:
    made = compared(
        by_hand("fp32", 0, 0.9),
        by_hand("fp32", 1, 1.0),
        by_hand("low", 0, 0.5),
        by_hand("low", 1, 0.75),
        by_hand("lower", 0, 0.5, promoted=1),
        by_hand("lower", 1, 0.25, diverged=True),
        by_hand("bad", 0, 0.0, diverged=True),
        by_hand("bad", 1, 0.0, diverged=True),
    )
    return dataclasses.replace(made, **changes)


def texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


@pytest.fixture
def svg(tmp_path: Path) -> Path:
    return tmp_path / "picture.svg"


def test_accuracy_says_what_it_shows(svg: Path) -> None:
    save_picture(accuracy_picture(comparison()), svg)
    found = texts(svg)
    assert {"fp32", "low", "lower", "bad", "diverged", "(1 of 2 diverged)", "(2 of 2 diverged)"} <= set(found)
    assert "accuracy (%) at the end of training" in found
    assert "low ratio: share of the elements in their low format, at the end of training" in found
    assert any("mean of 2 seeds; bars: lowest to highest" in text for text in found)
    assert any(text.endswith("%") for text in found)


def test_points_bars_and_level_stand_where_the_numbers_are() -> None:
    figure = accuracy_picture(comparison())
    axes, strip = figure.axes
    low = next(container for container in axes.containers if container.get_label() == "low")
    points, _, (across, along) = low.lines
    assert [*points.get_xdata()] == [0.5]
    assert [*points.get_ydata()] == [0.625]
    assert along.get_segments()[0][:, 1].tolist() == [0.5, 0.75]
    assert across.get_segments()[0][:, 0].tolist() == [0.5, 0.5]
    level = next(line for line in axes.lines if [*line.get_ydata()] == [pytest.approx(0.95)] * 2)
    assert level.get_linestyle() == "--"
    assert sorted(line.get_xdata()[0] for line in strip.lines) == [0.4375, 0.5]  # lower, of both seeds; bad


def test_markers_and_colours_tell_variants_apart() -> None:
    axes = accuracy_picture(comparison()).axes[0]
    styles = [(c.lines[0].get_marker(), c.lines[0].get_color()) for c in axes.containers]
    assert len({marker for marker, _ in styles}) == len({colour for _, colour in styles}) == 3


def test_without_a_divergence_there_is_no_strip() -> None:
    made = compared(by_hand("fp32", 0, 0.9), by_hand("low", 0, 0.5))
    assert len(accuracy_picture(made).axes) == 1


@pytest.mark.parametrize(
    ("every", "words"), [((1, 1), ["with promotion"]), ((0, 0), ["without promotion"]), ((0, 1), [])]
)
def test_plans_of_one_kind_are_joined(every: tuple[int, int], words: list[str], svg: Path) -> None:
    made = compared(by_hand("a", 0, 0.5), by_hand("b", 0, 0.75, promoted=2))
    rows = [dataclasses.replace(row, promote_every=n) for row, n in zip(made.variants, every, strict=True)]
    save_picture(accuracy_picture(dataclasses.replace(made, variants=tuple(rows))), svg)
    assert [text for text in texts(svg) if text.endswith("promotion")] == words


@pytest.mark.parametrize("picture", BOTH)
def test_the_legend_hides_no_data(picture: Callable[[Comparison], Figure]) -> None:
    figure = picture(comparison())
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().x0 >= figure.axes[0].get_window_extent().x1


def test_curves_say_what_they_show(svg: Path) -> None:
    save_picture(curves_picture(comparison()), svg)
    found = texts(svg)
    assert {"fp32", "low", "lower", "bad", "epoch", "accuracy (%) after each epoch"} <= set(found)
    assert any("bands: lowest to highest" in text for text in found)


def test_curves_are_means_and_bands_of_the_runs_that_did_not_diverge() -> None:
    axes = curves_picture(comparison()).axes[0]
    lines = {str(line.get_label()).split("\n")[0]: [*line.get_ydata()] for line in axes.lines}
    assert lines["fp32"] == [pytest.approx(0.95)]
    assert lines["low"] == [0.625]
    assert lines["lower"] == [0.5]
    assert lines["bad"] == []
    bands = [path.vertices[:, 1] for band in axes.collections for path in band.get_paths()]
    assert [(min(band), max(band)) for band in bands if len(band)] == [(0.9, 1.0), (0.5, 0.75), (0.5, 0.5)]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses) == 3


def test_a_run_that_diverged_at_once_is_drawn_too() -> None:
    run = by_hand("bad", 0, 0.0, diverged=True)
    run = dataclasses.replace(run, result={**run.result, "epochs": []})
    axes = curves_picture(compared(by_hand("fp32", 0, 1.0), run)).axes[0]
    assert [line.get_marker() for line in axes.lines if line.get_label().startswith("_")] == ["x"]


def test_a_task_without_metrics_is_judged_by_its_loss(svg: Path) -> None:
    runs = [by_hand(name, 0, 0.5) for name in ("fp32", "low")]
    bare = [
        dataclasses.replace(
            run, result={**run.result, "metrics": {}, "fp32_metrics": {}, "epochs": [{"loss": 1.5, "metrics": {}}]}
        )
        for run in runs
    ]
    for picture in BOTH:
        save_picture(picture(compared(*bare)), svg)
        assert any(text.startswith("mean training loss") for text in texts(svg))


def test_long_names_leave_room_for_the_axes(svg: Path) -> None:
    runs = [by_hand(f"{number}/a/very/long/path/to/the/plans/of/yesterday/plan.json", 0, 0.5) for number in range(12)]
    figure = accuracy_picture(compared(*runs))
    save_picture(figure, svg)
    assert figure.axes[0].get_position().width > 0.55
    assert sum(text.endswith("…ay/plan.json") for text in texts(svg)) == 12


def test_both_pictures_are_written_and_the_same_again(tmp_path: Path) -> None:
    paths = picture_paths(tmp_path / "compare.json", None)
    assert [path.name for path in paths] == ["compare.svg", "compare-curves.svg"]
    assert draw(comparison(), paths, required=True) == tuple(f"wrote {path}" for path in paths)
    before = [path.read_bytes() for path in paths]
    draw(comparison(), paths, required=True)
    assert [path.read_bytes() for path in paths] == before


def test_png_by_its_suffix(tmp_path: Path) -> None:
    save_picture(accuracy_picture(comparison()), tmp_path / "picture.PNG")
    data = (tmp_path / "picture.PNG").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (900, 600)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"\.gif: its suffix must be one of \.svg, \.png"):
        check_picture(tmp_path / "a.gif")
    with pytest.raises(ComparisonError, match="there is no directory"):
        check_picture(tmp_path / "nowhere" / "a.svg")
    with pytest.raises(ComparisonError, match="cannot hold both"):
        picture_paths(tmp_path / "a.svg", None)
    for picture in BOTH:
        with pytest.raises(ComparisonError, match=r"no metric 'bleu' to draw.*has: accuracy"):
            picture(comparison(), "bleu")
        with pytest.raises(ComparisonError, match="no run of the comparison has finished"):
            picture(comparison(runs=()))


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ComparisonError, match=r"pip install 'precision-assign\[report\]'"):
        picture_paths(tmp_path / "compare.json", tmp_path / "a.svg")
    paths = picture_paths(tmp_path / "compare.json", None)  # nobody asked for one
    (said,) = draw(comparison(), paths, required=False)
    assert said.startswith("no picture: pictures are drawn with matplotlib")
    with pytest.raises(ComparisonError, match="not installed"):
        draw(comparison(), paths, required=True)


@pytest.mark.parametrize("picture", BOTH)
def test_names_are_no_formulas(picture: Callable[..., Figure], svg: Path) -> None:
    """A name comes from a file, and a broken formula in it would end the drawing."""
    name = "$\\frac{$\x1b"
    save_picture(picture(compared(by_hand("fp32", 0, 0.9), by_hand(name, 0, 0.5), task=name)), svg)
    assert "$\\frac{$\\x1b" in " ".join(texts(svg))
