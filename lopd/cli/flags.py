"""Flags of a command, from the settings of its config dataclass: options of click, by group."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any

import click
from click.shell_completion import CompletionItem

from lopd.cli.commands import COMMANDS, Command
from lopd.config.fields import GROUPS
from lopd.config.parse import flag
from lopd.config.values import choices_of, kinds_of

# Both spellings are accepted, the one with dashes is shown.
CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "max_content_width": 80,
}
WIDTH = 78
COLUMN = 26  # of the flags; a longer one has a line of its own
KEEP = "\N{NO-BREAK SPACE}"


class Value(click.types.StringParamType):
    """Any text. `lopd.config.values` converts it, so that flags and YAML have one set of rules."""

    name = "text"

    def __init__(self, item: Field[Any]) -> None:
        self.choices = choices_of(item)
        words = {int: "INT", float: "FLOAT"}
        known = "{" + ",".join(self.choices) + "}"
        self.shown = known if self.choices else words.get(kinds_of(item)[-1], "TEXT")

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        """The choices that begin like the word; file names if there are none."""
        if not self.choices:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(name) for name in self.choices if name.startswith(incomplete)]


class SettingsCommand(click.Command):
    """A command whose help has the required flags first, the others by group, and examples."""

    def __init__(self, name: str, about: Command, **changes: Any) -> None:
        self.about = about
        self.config_class = about.config_class()
        self.items = sorted(
            fields(self.config_class), key=lambda item: GROUPS.index(item.metadata["group"])
        )
        options: list[click.Parameter] = [option(item) for item in self.items]
        if about.positional:
            count = -1 if about.many else 1
            options.append(click.Argument([about.positional + "_"], required=False, nargs=count))
        super().__init__(
            name,
            params=[*options, *general_options()],
            context_settings=CONTEXT,
            help=self.config_class.__doc__,
            **changes,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words; switches may have the value that older versions took."""
        switches = {flag(item.name): item.name for item in self.items if bool in kinds_of(item)}
        return super().parse_args(ctx, list(_without_values(args, switches)))

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What follows the command's name in the usage line."""
        pieces = [
            item.name.upper()
            if item.name == self.about.positional
            else f"{flag(item.name)} {Value(item).shown}"
            for item in self.items
            if item.default is MISSING
        ]
        return [*pieces, "[FLAGS]"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags by group."""
        for group, rows in self.rows().items():
            with formatter.section(group):
                formatter.write("".join(two_columns(rows)))

    def rows(self) -> dict[str, list[tuple[str, str]]]:
        """The flags and their help, by group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for item in self.items:
            groups.setdefault(item.metadata["group"], []).append(self.row(item))
        general = [
            (" ".join(filter(None, (found.opts[-1], found.metavar))), found.help or "")
            for found in general_options()
        ]
        groups["General"] = [*general, ("--help", "Show this message and exit.")]
        return groups

    def row(self, item: Field[Any]) -> tuple[str, str]:
        """A flag as help shows it, and its help: other settings as flags, then the default."""
        name, text, default = flag(item.name), item.metadata["help"], item.default
        if bool in kinds_of(item):
            if default is True:
                name, text = flag("no_" + item.name), item.metadata["off"]
        else:
            value = Value(item)
            if len(f"  {name} {value.shown}") > WIDTH:
                name, text = f"{name} NAME", f"{text} One of {', '.join(value.choices)}."
            else:
                name += f" {value.shown}"
            if default is not MISSING and default is not None:
                text += f" [default:{KEEP}{default}]"
        others = "|".join(other.name for other in self.items if "_" in other.name)
        return name, re.sub(
            rf"\b(?:{others})\b", lambda found: flag(found[0]), text
        ) if others else text

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        with formatter.section("Examples"):
            for example in self.about.examples:
                for line in wrapped(f"lopd {self.name} {example}"):
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
        if self.about.recipe:
            with formatter.section("A recipe"):
                formatter.write(textwrap.indent(self.about.recipe, "  "))


def _without_values(words: list[str], switches: dict[str, str]) -> Iterator[str]:
    """`--switch true` and `--switch=false`, as older scripts have them, without their values."""
    rest = list(words)
    while rest:
        word, equals, value = rest.pop(0).partition("=")
        name = switches.get(word.replace("_", "-"))
        if name and not equals and rest and rest[0].lower() in ("true", "false"):
            value = rest.pop(0)
        if name and value.lower() in ("true", "false"):
            yield flag(name) if value.lower() == "true" else flag(f"no_{name}")
        else:
            yield f"{word}{equals}{value}"


def option(item: Field[Any]) -> click.Option:
    """The flag of a setting. Without it the option's value is None."""
    if bool in kinds_of(item):
        names = f"{flag(item.name)}/{flag('no_' + item.name)}"
        return click.Option([item.name, names], default=None, is_flag=True)
    many = item.metadata["many"]
    return click.Option([item.name, flag(item.name)], type=Value(item), default=None, multiple=many)


def general_options() -> list[click.Option]:
    """Flags of every command that are no settings of its config."""
    return [
        click.Option(
            ["--config"],
            type=click.Path(),
            metavar="FILE",
            help="YAML file of settings, by the names of the flags; flags override it.",
        ),
        click.Option(
            ["--rehash"], is_flag=True, help="Hash models again instead of using stored hashes."
        ),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print results and warnings only."),
    ]


def two_columns(rows: list[tuple[str, str]]) -> Iterator[str]:
    """Lines of flags and their help. Flags in the help are not broken at their dashes."""
    column = min(COLUMN, max(len(name) for name, _ in rows))
    for name, text in rows:
        lines = textwrap.wrap(text, WIDTH - column - 4, break_on_hyphens=False)
        if len(name) > column:
            yield f"  {name}\n"
            name = ""
        for line in lines:
            yield f"  {name:<{column}}  {line.replace(KEEP, ' ')}\n"
            name = ""


def wrapped(command: str) -> Iterator[str]:
    """The lines of a shell command, as wide as the help; a flag and its value stay together."""
    line = ""
    for words in re.findall(r"--\S+(?: (?!--)\S+)?|\S+", command):
        if len(line) + len(words) > WIDTH - 4:
            yield f"{line} \\"
            line = "   "
        line = f"{line} {words}" if line else words
    yield line


def map_of_the_pipeline(formatter: click.HelpFormatter) -> None:
    """What `lopd --help` shows: each command, what it reads and what it writes."""
    width = max(map(len, COMMANDS))
    for section in dict.fromkeys(about.section for about in COMMANDS.values()):
        with formatter.section(section):
            for name, about in COMMANDS.items():
                if about.section == section:
                    formatter.write(f"  {name:<{width}}  {about.summary}\n")
                    formatter.write(f"  {'':<{width}}  {about.flow}\n")
