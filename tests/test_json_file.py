"""The one reader of JSON files: what it refuses before any schema is asked, and how it says so."""

import os
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from assign.errors import PlanError
from assign.json_file import LARGEST, LARGEST_WHOLE, MOST_BYTES, MOST_LEVELS, Kind

KIND = Kind(name="plan", error=PlanError, advice="Give a plan.")


def refusal(text: str) -> str:
    with pytest.raises(PlanError) as caught:
        KIND.parse(text, "a.json")
    assert str(caught.value).startswith("a.json is not ")
    assert str(caught.value).endswith("Give a plan.")
    assert len(str(caught.value)) < 400  # however long the file
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("NaN", "holds the number NaN, and only finite ones"),
        ('{"a": [-Infinity]}', "holds the number -Infinity"),
        ("1e999", "holds the number 1e999, and only finite ones"),
        ("-1e151", "only numbers up to ±1e+150"),
        (str(LARGEST_WHOLE), r"only whole numbers up to ±2**64 are allowed"),
        ("-" + "9" * 100_000, "(100,001 characters), and only whole numbers"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "has the key 'c' twice"),
        ('{"' + "k" * 10_000 + '": 1, "' + "k" * 10_000 + '": 2}', "twice; keep one"),
        ("[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1), "deeper than 64 levels"),
        ('{"a":' * 100_000, "deeper than 64 levels"),
        ('["\\ud800"]', "which contains half of a surrogate pair"),
        ('{"\\udfff": 1}', "which contains half of a surrogate pair"),
        ("[1, 2", "is not JSON: Expecting ',' delimiter at line 1, column 6, of 1 lines"),
    ],
)
def test_refused_before_any_schema(text: str, fact: str) -> None:
    assert fact in refusal(text)


def test_the_largest_that_is_allowed_is_read() -> None:
    assert KIND.parse(str(LARGEST_WHOLE - 1), "") == LARGEST_WHOLE - 1
    assert KIND.parse(str(LARGEST), "") == LARGEST
    assert KIND.parse("[" * MOST_LEVELS + "]" * MOST_LEVELS, "")
    assert KIND.parse('"\\ud83d\\ude00 \\u0000"', "") == "\U0001f600 \0"


def test_a_schema_is_strict_and_says_where() -> None:
    schema = TypeAdapter(dict[str, list[int]])
    assert KIND.load(schema, '{"a": [1]}', "a.json") == {"a": [1]}
    with pytest.raises(
        PlanError, match=r"a.json is not a valid plan:\n  a → 1: Input should be a valid integer\n  Give"
    ):
        KIND.load(schema, '{"a": [1, "2"]}', "a.json")
    with pytest.raises(PlanError, match="and 2 more"):
        KIND.load(schema, '{"a": ["1", "2", "3", "4", "5"]}', "a.json")


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MOST_BYTES + 1)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "other").write_text("ключ", encoding="utf-16")
    wanted = {
        "large": "is not a plan: it is larger than 64 MiB",
        "loop": "cannot read the plan .*loop: Too many levels",
        "other": "it is not text in UTF-8",
        ".": "is a directory, not a plan",
        "none": "there is no plan",
        "a\0b": "cannot read the plan",
    }
    for name, fact in wanted.items():
        with pytest.raises(PlanError, match=fact):
            KIND.read(tmp_path / name)
