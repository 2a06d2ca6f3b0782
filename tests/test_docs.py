"""The site: built without a warning, all that is public in it once, and nothing asked of the network."""

import ast
import copy
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.main import get_command

import assign
from assign import errors
from assign.cli import app

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```", re.S | re.M)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Text by name: ``find`` is that of ``find/index.html``, '' that of the front page."""
    found = {str(path.parent.relative_to(site)).strip("."): path.read_text() for path in site.rglob("index.html")}
    assert set(found) == {"", "find", "train", "check", "plans", "look", "errors", "commands"}
    return found


def headings(pages):
    """Paths of the objects that the reference describes."""
    return [path for text in pages.values() for path in re.findall(r'<h\d id="(assign\.[\w.]+)" class="doc', text)]


def test_every_public_name_is_in_the_reference_once(pages):
    paths = [path for path in headings(pages) if not path.startswith("assign.integrations.")]
    described = Counter(id(pkgutil.resolve_name(path)) for path in set(paths))
    assert [path for path, times in Counter(paths).items() if times > 1] == []
    for name in assign.__all__:
        assert described[id(getattr(assign, name))] == 1, name


def test_every_error_is_in_the_reference_once(pages):
    kinds = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, assign.AssignError)]
    times = Counter(headings(pages))
    assert len(kinds) > 5
    for kind in kinds:
        assert times[f"assign.errors.{kind.__name__}"] == 1, kind


def test_both_trainers_are_in_the_reference(pages):
    for library in ("transformers", "lightning"):
        assert f"assign.integrations.{library}.PlanCallback" in headings(pages)


def test_every_command_and_option_is_on_the_page_of_commands(pages):
    sections = re.split(r"<h2 id=", pages["commands"])[1:]
    found = {re.search(r"<code>assign ([a-z]+)</code>", each)[1]: each for each in sections}
    commands = get_command(app).commands
    assert list(found) == list(commands)
    for name, command in commands.items():
        for option in [option for parameter in command.params for option in parameter.opts if option[0] == "-"]:
            assert re.search(rf"<code>[^<]*{option}\b", found[name]), (name, option)
        assert command.help.split("\n")[0][:40] in unescape(found[name])


def test_the_front_page_is_the_readme(pages):
    prose = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.*)", prose, re.M)
    shown = [unescape(each) for each in re.findall(r"<h[1-6] id=[^>]*>(.*?)<a class=\"headerlink", pages[""])]
    assert shown == titles


def test_docstrings_are_rendered_whole(pages):
    kinds = "|".join(name for name, each in vars(errors).items() if isinstance(each, type))
    for name in set(pages) - {"", "commands"}:
        text = pages[name]
        assert not re.search(r":(func|class|meth|mod):", text), name
        assert not re.search(r"<p>(Args|Attributes|Examples|Raises|Returns):", text), name
        assert "<blockquote>" not in text, name  # what >>> is outside of a section of examples
        assert 'class="source"' not in text  # a source of two lines, taken for a box
        assert not re.search(r"<p>[^<]*::</p>", text), name
        assert not re.search(rf"^ *<code>({kinds})</code>", text, re.M), name  # what is raised leads to its class


class Loads(HTMLParser):
    """Addresses of what a page loads, links to click on left out."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag in LOADS and given.get("rel") not in ("next", "prev", "canonical"):
            self.found += [given[LOADS[tag]]] if LOADS[tag] in given else []


def test_no_page_loads_anything_from_elsewhere(site, pages):
    for name, text in pages.items():
        loads = Loads(text).found
        assert any(each.endswith(".css") for each in loads)
        for each in loads:
            assert not re.match(r"(https?:)?//", each), (name, each)
            assert (site / name / each.partition("?")[0]).exists(), (name, each)
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", path.read_text()), path


def test_a_browser_asks_the_network_for_nothing(site, pages, browser):
    asked = []
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.on("request", lambda request: asked.append(request.url))
    for name in pages:
        page.goto((site / name / "index.html").as_uri())
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
    """What the reference says that its examples go on from."""
    names = {}
    exec(FENCE.search((ROOT / "docs/find.md").read_text())[2], names)
    return names


@pytest.mark.parametrize("block", [*examples()])
def test_examples_of_docstrings_run(block, beginning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {**beginning, "model": copy.deepcopy(beginning["model"])}
    exec("\n".join(line.removeprefix("    ") for line in block.splitlines()), names)


def test_the_most_used_names_have_an_example():
    shown = {each.id for each in examples()}
    assert {"search", "trace", "estimate", "apply", "optimizer", "Promotion", "measure_noise", "plot"} <= shown
