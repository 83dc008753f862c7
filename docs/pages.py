"""Hooks of the documentation site: the reference of the commands, and pages from other folders."""

import os.path
import re
from pathlib import Path
from typing import Any

from lopd.cli.commands import COMMANDS
from lopd.cli.flags import SettingsCommand

ROOT = Path(__file__).resolve().parents[1]
COMMANDS_PAGE = "reference/commands.md"
# Pages of the site that stand elsewhere in the repository.
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "speed.md": "benchmarks/NOTES.md",
}


def commands_page() -> str:
    """The reference of all commands, in Markdown, from their definitions."""
    lines = [
        "# Commands",
        "",
        "This page is generated from the settings that the commands declare. `lopd COMMAND --help`",
        "prints the same. `--config FILE.yaml` reads settings from a file: the names of the flags,",
        "with underscores or dashes; flags override it.",
    ]
    for section in dict.fromkeys(about.section for about in COMMANDS.values()):
        lines += ["", f"## {section}"]
        for name, about in COMMANDS.items():
            if about.section == section:
                lines += ["", *command_section(SettingsCommand(name, about))]
    return "\n".join(lines) + "\n"


def command_section(command: SettingsCommand) -> list[str]:
    """Purpose, examples and flags of one command."""
    about = command.about
    examples = [f"lopd {command.name} {example}".rstrip() for example in about.examples]
    lines = [
        f"### lopd {command.name}",
        "",
        about.summary,
        "",
        f"Reads and writes: `{about.flow}`",
        "",
        *("```sh", *examples, "```"),
    ]
    if about.recipe:
        lines += ["", "A recipe:", "", "```yaml", *about.recipe.splitlines(), "```"]
    for group, rows in command.rows().items():
        lines += ["", f"**{group}**", "", "| flag | meaning |", "| --- | --- |"]
        lines += [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in rows]
    return lines


def _cell(text: str) -> str:
    """Text as a cell of a Markdown table: no bars, no tags."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\N{NO-BREAK SPACE}", " ")


def source_of(page: str) -> str:
    """The file of a page, from the root of the repository."""
    return ELSEWHERE.get(page, f"docs/{page}")


def relinked(text: str, page: str) -> str:
    """The text of a page with links between files of the repository as links between pages."""
    pages = {file: name for name, file in ELSEWHERE.items()} | {"README.md": "index.md"}
    here = os.path.dirname(source_of(page))

    def link(found: re.Match[str]) -> str:
        file = os.path.normpath(os.path.join(here, found[1]))
        target = pages.get(file, file.removeprefix("docs/"))
        return f"]({os.path.relpath(target, os.path.dirname(page) or '.')}{found[2] or ''})"

    return re.sub(r"\]\((?!\w+:)([\w./-]+)(#[\w-]+)?\)", link, text)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    pages = {name: (ROOT / file).read_text(encoding="utf-8") for name, file in ELSEWHERE.items()}
    for name, text in ({COMMANDS_PAGE: commands_page()} | pages).items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Mark the flags, which site.css keeps on one line."""
    return re.sub(r"<code>(--[^<]{1,30})</code>", r'<code class="flag">\1</code>', html)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links to pages of the site."""
    return relinked(markdown, page.file.src_uri)
