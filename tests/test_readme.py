"""The README is short, and has what each reader looks for first."""

import re

from documents import PAGES, README, blocks, prose


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8000


def test_the_first_blocks_for_a_shell_are_the_main_job_and_the_tests():
    """``.ci/run`` reads the second one."""
    main_job, tests = [block.text for block in blocks("README.md", "sh")[:2]]
    assert "assign run digits --budget 60%" in main_job
    assert "assign report plan.json" in main_job
    assert tests == "pip install -e '.[test]' && pytest -n 2 --dist loadfile\n"


def test_the_readme_has_one_picture_with_device_and_date():
    ((_, picture),) = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", PAGES["README.md"])
    assert (README.parent / picture).is_file()
    caption = PAGES["README.md"].partition(picture)[2].partition("\n## ")[0]
    assert re.search(r"CPU|GPU", caption)
    assert re.search(r"\d{4}-\d\d-\d\d", caption)


def test_the_readme_has_eight_lines_of_python():
    (block,) = blocks("README.md", "python")
    assert len(block.text.splitlines()) == 8


def test_the_readme_has_the_sections_that_readers_look_for():
    titles = re.findall(r"^## (.*)", prose("README.md"), re.M)
    assert titles == [
        "Install and run",
        "When not to use this",
        "Results",
        "How it works",
        "Documentation",
        "Citation",
    ]
    rows = re.findall(r"^\| (?!model|-).*\|$", PAGES["README.md"], re.M)
    steps = re.findall(r"^\d\. \*\*", PAGES["README.md"], re.M)
    assert (len(rows), len(steps)) == (4, 4)
