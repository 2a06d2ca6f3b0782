"""Pages that have their text elsewhere: the front page is the README, the commands say themselves what they take."""

import re
from pathlib import Path

import typer.cli
import typer.core
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from typer.main import get_command

from assign.cli import app

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README with its pictures and the files that it links to, and the commands."""
    readme = (ROOT / "README.md").read_text()
    files.append(File.generated(config, "index.md", content=readme))
    for target in {each for each in re.findall(r"\]\(([^)#]+)", readme) if (ROOT / each).is_file()}:
        files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    files.append(File.generated(config, "commands.md", content=commands()))
    return files


def commands() -> str:
    """Every command's help in Markdown, by typer's own writer."""
    group = get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    with typer.Context(group, info_name="assign") as context:
        pages = [
            typer.cli.get_docs_for_click(obj=each, ctx=context, indent=1, call_prefix="assign")
            for each in group.commands.values()
        ]
    return "\n".join([f"# Commands\n\n{group.help}\n", *pages])
