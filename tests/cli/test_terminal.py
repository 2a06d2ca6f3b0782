"""Text from files on the terminal: no markup, no links, no escape sequences, whatever table it stands in."""

import io
import json

import pytest
from shell import fails, run

from assign.plan.plan import Assignment, Entry, Provenance
from assign.report.terminal import Terminal, visible

EVIL = "[/] [bold red]a[/bold red] [link=http://x]b[/link] \x1b]8;;http://x\x07c\x1b[2J \x9b31m \u202ed :skull: \x00"


def terminal() -> Terminal:
    return Terminal(file=io.StringIO(), force_terminal=True, width=400, color_system="truecolor")


def written(console: Terminal) -> str:
    return console.file.getvalue()


def assert_harmless(text: str) -> None:
    """What a terminal obeys is not in it, and what rich would obey stands in it as it was."""
    for character in "\x1b\x9b\x07\x00\u202e":
        assert character not in text


def test_text_is_shown_and_not_obeyed() -> None:
    console = terminal()
    console.print(EVIL, highlight=False)
    assert written(console) == visible(EVIL) + "\n"
    assert_harmless(visible(EVIL))
    assert "[/] [bold red]a[/bold red] [link=http://x]b[/link] \\x1b]8;;http://x\\x07c" in visible(EVIL)
    assert ":skull:" in visible(EVIL)
    assert visible("Γ > 2δ\té 日本\n") == "Γ > 2δ\té 日本\n"


def test_a_line_that_turns_is_not_obeyed() -> None:
    with Terminal(file=io.StringIO()).status(f"loading {EVIL}"):
        pass  # rich would raise MarkupError


@pytest.fixture
def evil(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = Assignment(
        entries={EVIL: Entry("bf16", True), f"{EVIL}/relu": Entry("e4m3", False)},
        recipe=EVIL,
        fingerprint=EVIL,
        provenance=Provenance(
            command=EVIL, versions={EVIL: EVIL}, strategy=EVIL, created=EVIL, estimate={EVIL: EVIL, "by_greedy": False}
        ),
    )
    plan.save("a.json")
    plan.replace({f"{EVIL}2": Entry("fp16", False)}).save("b.json")
    return tmp_path


@pytest.mark.parametrize("command", [("show", "a.json"), ("show", "a.json", "--all"), ("diff", "a.json", "b.json")])
def test_plans_of_strangers_are_shown_as_they_are(evil, command) -> None:
    text = run(*command)
    assert_harmless(text)
    assert "[/] [bold" in text
    assert "a[/bold red]" in " ".join(text.split())


def test_errors_are_shown_as_they_are(evil, capsys, monkeypatch) -> None:
    data = json.loads((evil / "a.json").read_text())
    data["tensors"][EVIL]["format"] = EVIL
    (evil / "wrong.json").write_text(json.dumps(data))
    text = fails(capsys, monkeypatch, "show", "wrong.json")
    assert_harmless(text)
    assert "[link=http://x]" in text
