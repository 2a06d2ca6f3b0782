"""The site: built without a warning, all that is public in it once, and nothing asked of the network."""

import ast
import copy
import json
import os
import pkgutil
import posixpath
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser

import pytest
from documents import ROOT, blocks, prose
from typer.main import get_command

import assign
from assign import errors
from assign.cli import app

FENCE = re.compile(r"^( *)```python\n(.*?)^ *```", re.S | re.M)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(folder)]
    done = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Text by name, for example ``reference/find``; the front page is ``index``."""
    found = {str(path.relative_to(site).with_suffix("")): path.read_text() for path in site.rglob("*.html")}
    for made in ("genindex", "py-modindex", "search"):  # by Sphinx alone
        del found[made]
    written = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    notebooks = [path.relative_to(ROOT) for path in (ROOT / "notebooks").glob("*.ipynb")]
    assert set(found) == {str(each.with_suffix("")) for each in [*written, *notebooks]}
    assert len(notebooks) > 4
    return found


def described(pages):
    """Paths of the objects that the reference describes."""
    return [path for text in pages.values() for path in re.findall(r'<dt class="sig[^>]* id="(assign\.[\w.]+)"', text)]


def test_every_public_name_is_in_the_reference_once(pages):
    paths = [path for path in described(pages) if not path.startswith("assign.integrations.")]
    times = Counter(id(pkgutil.resolve_name(path)) for path in set(paths))
    assert [path for path, count in Counter(paths).items() if count > 1] == []
    for name in assign.__all__:
        assert times[id(getattr(assign, name))] == 1, name


def test_every_error_is_in_the_reference_once(pages):
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, assign.AssignError)]
    times = Counter(described(pages))
    assert len(kinds) > 5
    for kind in kinds:
        assert times[f"assign.errors.{kind.__name__}"] == 1, kind


def test_both_trainers_are_in_the_reference(pages):
    for library in ("transformers", "lightning"):
        assert f"assign.integrations.{library}.PlanCallback" in described(pages)


def text_of(html):
    """Return what a reader sees, with ASCII quotes."""
    return unescape(re.sub(r"<[^>]*>", "", html)).replace("’", "'").replace("“", '"').replace("”", '"')


def test_every_command_and_option_is_on_the_page_of_commands(pages):
    sections = re.split(r"<h2>", pages["reference/commands"])[1:]
    found = {re.match(r"assign ([a-z]+)", text_of(each))[1]: text_of(each) for each in sections}
    commands = get_command(app).commands
    assert list(found) == list(commands)
    for name, command in commands.items():
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        for option in [option for parameter in shown for option in parameter.opts if option[0] == "-"]:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", found[name].partition("Options:")[2]), (name, option)
        assert command.help.split("\n")[0][:40] in found[name]


@pytest.mark.parametrize(
    ("page", "file"), [("index", "README.md"), ("contributing", "CONTRIBUTING.md"), ("changelog", "CHANGELOG.md")]
)
def test_pages_of_the_root_are_on_the_site(pages, page, file):
    titles = re.findall(r"^#+ (.*)", prose(file), re.M)
    shown = [text_of(each).removesuffix("¶") for each in re.findall(r"<h[1-6]>(.*?)</h[1-6]>", pages[page])]
    assert shown == [title.replace("`", "") for title in titles]


def test_notebooks_are_shown_with_their_outputs(pages):
    for name in [each for each in pages if each.startswith("notebooks/")]:
        cells = json.loads((ROOT / f"{name}.ipynb").read_text())["cells"]
        outputs = [cell for cell in cells if cell.get("outputs")]
        assert pages[name].count('class="cell_output') == len(outputs) > 0, name


def test_every_page_can_be_reached_from_the_front_page(pages):
    seen, new = set(), {"index"}
    while new:
        seen |= new
        found = set()
        for name in new:
            for target in re.findall(r'<a class="[^"]*" href="([^"#:]+)\.html', pages[name]):
                found.add(posixpath.normpath(posixpath.join(posixpath.dirname(name), target)))
        new = (found & set(pages)) - seen
    assert seen == set(pages)


def test_docstrings_are_rendered_whole(pages):
    kinds = "|".join(name for name, each in vars(errors).items() if isinstance(each, type))
    for name in [each for each in pages if each.startswith("reference/") and each != "reference/commands"]:
        text = pages[name]
        assert not re.search(r":(func|class|meth|mod):", text), name
        assert not re.search(r"<p>(Args|Attributes|Examples|Raises|Returns|Source|Yields):", text), name
        assert "<blockquote>" not in text, name  # an indentation that is none
        assert "```" not in text, name
        assert not re.search(r"<p>[^<]*(::|&gt;&gt;&gt;)", text), name
        assert not re.search(rf"(?<!\">)<strong>({kinds})</strong>", text), name  # what is raised leads to its class


def test_a_name_that_does_not_exist_is_a_warning(tmp_path):
    """What the build refuses, so that ``-W`` means something: a wrong role, a wrong link, a page in no list."""
    role = "```{eval-rst}\n.. autofunction:: broken.function\n```"
    (tmp_path / "start.md").write_text(f"# Title\n\n[gone](gone.md)\n\n{role}\n")
    (tmp_path / "alone.md").write_text("# Alone\n")
    (tmp_path / "broken.py").write_text('def function():\n    """Call :func:`assign.nothing`."""\n')
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "pseudoxml", "-D", "root_doc=start"]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command += ["-c", str(ROOT / "docs"), str(tmp_path), str(tmp_path / "site")]
    done = subprocess.run(command, env=here, timeout=300, capture_output=True, text=True)
    assert done.returncode != 0
    for part in ("there is no 'assign.nothing'", "'gone.md'", "alone.md"):
        assert part in done.stderr, done.stderr


class Loads(HTMLParser):
    """Addresses of what a page loads, links to click on left out."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in LOADS and given.get("rel") not in ("next", "prev", "canonical", "index", "search"):
            self.found += [given[LOADS[tag]]] if LOADS[tag] in given else []


def test_no_page_loads_anything_from_elsewhere(site, pages):
    for name, text in pages.items():
        loads = Loads(text).found
        assert any(each.partition("?")[0].endswith(".css") for each in loads)
        for each in loads:
            assert not re.match(r"(https?:)?//", each), (name, each)
            assert each.startswith("data:") or (site / name).parent.joinpath(each.partition("?")[0]).exists(), (
                name,
                each,
            )
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path


def test_a_browser_asks_the_network_for_nothing(site, pages, browser):
    asked = []
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("request", lambda request: asked.append(request.url))
    for name in pages:
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name  # only code and tables scroll
    assert len(asked) > len(pages)
    assert not [url for url in asked if url.startswith("http")]


def examples():
    """Every example in a docstring, by the object's name."""
    for path in sorted((ROOT / "assign").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for _, block in FENCE.findall(ast.get_docstring(node) or ""):
                    yield pytest.param(block, id=node.name)


@pytest.fixture(scope="module")
def beginning():
    """The names with which the reference says that its examples begin."""
    names = {}
    exec(blocks("docs/reference/index.md", "python")[0].text, names)
    return names


@pytest.mark.parametrize("block", [*examples()])
def test_examples_of_docstrings_run(block, beginning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {**beginning, "model": copy.deepcopy(beginning["model"])}
    exec("\n".join(line.removeprefix("    ") for line in block.splitlines()), names)


def test_the_most_used_names_have_an_example():
    shown = {each.id for each in examples()}
    assert {"search", "trace", "estimate", "apply", "optimizer", "Promotion", "measure_noise", "plot"} <= shown
