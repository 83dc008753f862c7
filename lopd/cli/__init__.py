"""The `lopd` command: one subcommand per stage, flags or YAML, one-line errors."""

import difflib
import gc
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click
from click.shell_completion import get_completion_class

from lopd import __version__
from lopd.cli.commands import COMMANDS, NOTHING
from lopd.cli.flags import CONTEXT, SettingsCommand, map_of_the_pipeline
from lopd.cli.signals import ending_in_order
from lopd.config.parse import build_config, check_keys
from lopd.config.strict_yaml import load_yaml
from lopd.config.values import pairs
from lopd.errors import Interrupted, LopdError

SHELLS = ("bash", "zsh", "fish")
# Packages that the extras of lopd install.
EXTRAS = {
    **dict.fromkeys(("transformers", "accelerate", "tqdm", "jinja2", "tokenizers"), "train"),
    **{"math_verify": "eval", "matplotlib": "bench", "pyarrow": "parquet", "peft": "peft"},
}
HELP = f"""\
Offline on-policy distillation of language models, lopd {__version__}.

The teacher scores the student's answers once; training then needs no teacher.
"""
EPILOG = """\
A name with a slash is a folder. `lopd COMMAND --help` lists the flags of a command and shows \
examples; `--config FILE` reads them from YAML. Shell completion: eval "$(lopd completion bash)".
"""


class Commands(click.Group):
    """The commands of lopd. Each is made when it is needed, from the settings of its stage."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of the map."""
        return [*COMMANDS, "completion"]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        if name not in COMMANDS:
            return super().get_command(ctx, name)
        return SettingsCommand(
            name, COMMANDS[name], callback=prepare, short_help=COMMANDS[name].summary
        )

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """The command that the words name, in either spelling, or an error that proposes one."""
        name = args[0].replace("_", "-")
        if not name.startswith("-"):
            check_keys([name], self.list_commands(ctx), "lopd", "command")
        return super().resolve_command(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """What follows `lopd` in the usage line."""
        return ["COMMAND", "[FLAGS]"]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the map of the pipeline."""
        map_of_the_pipeline(formatter)


@click.command(cls=Commands, context_settings=CONTEXT, help=HELP, epilog=EPILOG)
@click.version_option(__version__, message="%(version)s")
def group() -> None:
    """Every command of lopd; its help is `HELP`."""


@group.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell, to be evaluated in its start-up file."""
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(group, {}, "lopd", "_LOPD_COMPLETE").source())


@click.pass_context
def prepare(
    ctx: click.Context, /, *, config: str | None, rehash: bool, quiet: bool, **flags: Any
) -> Callable[[], None]:
    """Build the config of a command; returns what runs its stage."""
    command = ctx.command
    assert isinstance(command, SettingsCommand)
    prog = f"lopd {command.name}"
    if positional := command.about.positional:
        given = flags.pop(positional + "_")
        if command.about.many:
            given = ",".join(given) or None
        flags[positional] = flags[positional] if given is None else given
    flags |= {
        name: pairs(name, texts) if texts else None
        for name, texts in flags.items()
        if isinstance(texts, tuple)
    }
    settings = {} if config is None else load_yaml(config)
    built = build_config(command.config_class, settings, flags, config or prog, prog)

    def run() -> None:
        module = _stage(command.about.module, quiet)
        if rehash:
            from lopd.provenance import forget_fingerprints

            forget_fingerprints()
        done = module.main(built)
        _leave_process_group()
        if done is not None:
            logging.getLogger("lopd").info(f"{prog}: output in {done}")

    return run


def _stage(name: str, quiet: bool) -> Any:
    """The module of a stage. Progress bars are for terminals only."""
    show_messages(quiet)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    return importlib.import_module(f"lopd.stages.{name}")


def show_messages(quiet: bool = False) -> None:
    """Write what lopd logs on stderr; with `quiet` warnings only."""
    logger = logging.getLogger("lopd")
    logger.handlers = [Messages()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class Messages(logging.Handler):
    """Writes messages to the present stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message."""
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(self.format(record), file=sys.stderr)
        else:
            print(self.format(record), file=sys.stderr)


def complete_streams() -> None:
    """Let every standard stream take any text.

    A daemon may start a process without them: Python then has None in their place, and the next
    file that is opened would get their numbers, and what is written to standard error. An encoding
    such as ASCII lacks characters of the results, which are written as escapes there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _leave_process_group() -> None:
    """Destroy the process group that accelerate opened for training under torchrun.

    Its threads would otherwise still run while the interpreter exits, which can abort a process
    whose work is done. Groups of others, such as vLLM's, are theirs to close.
    """
    state = sys.modules.get("accelerate.state")
    if state is not None and state.is_initialized():
        gc.collect()  # a wrapped model holds the group
        state.PartialState().destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, or the exit code of an error that it prints in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv == ["help"]:
        argv = ["--help"]
    name = argv[0].replace("_", "-")
    prog = f"lopd {name}" if name in COMMANDS else "lopd"
    try:
        complete_streams()
        with ending_in_order():
            job = group.main(argv, prog_name="lopd", standalone_mode=False)
            if callable(job):
                job()
        sys.stdout.flush()
    except click.UsageError as error:
        return _fail(prog, usage_error(error, prog))
    except ModuleNotFoundError as error:
        return _fail(prog, missing_package(error))
    except BrokenPipeError:  # the reader of the output has gone; click exits in the same way
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (LopdError, OSError) as error:
        return _fail(prog, str(error), getattr(error, "exit_code", 2))
    except (KeyboardInterrupt, click.Abort) as error:
        if isinstance(error, Interrupted) and error.orderly:
            _leave_process_group()
        kept = str(error) or (COMMANDS[name].kept if name in COMMANDS else NOTHING)
        print(f"{prog}: interrupted; {kept}", file=sys.stderr)
        return getattr(error, "exit_code", 128 + signal.SIGINT)
    return 0


def _fail(prog: str, message: str, code: int = 2) -> int:
    text = " ".join(message.split()).removeprefix(f"{prog}: ")
    print(f"{prog}: error: {text}", file=sys.stderr)
    return code


def usage_error(error: click.UsageError, prog: str) -> str:
    """What is wrong with the command line, and what to write."""
    command = error.ctx.command if error.ctx else group
    if isinstance(error, click.NoSuchOption):
        known = [name for param in command.params for name in (*param.opts, *param.secondary_opts)]
        near = difflib.get_close_matches(error.option_name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"see {prog} --help"
        return f"unknown flag '{error.option_name}'; {hint}"
    text = error.format_message().rstrip(".")
    if "not take a value" in text or "extra argument" in text:
        text += "; write --NAME or --no-NAME for a switch; other flags have one value"
    return f"{text}; see {prog} --help"


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install for a package that is not there."""
    extra = EXTRAS.get((error.name or "").split(".")[0])
    return str(error) if extra is None else f'{error}; pip install "lopd[{extra}]"'
