"""The `lopd` command: one subcommand per stage, flags or YAML, one-line errors."""

import gc
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from lopd import __version__
from lopd.config.parse import build_config, check_keys, load_yaml
from lopd.errors import ConfigError, Interrupted, LopdError

# name: (module of lopd.stages, config class, summary)
COMMANDS = {
    "sft-data": ("sft_data", "SftDataConfig", "sample the teacher's answers to prompts"),
    "sft": ("sft", "SftConfig", "fine-tune the student on those answers"),
    "rollout": ("rollout", "RolloutConfig", "sample the fine-tuned student once"),
    "score": ("score", "ScoreConfig", "score the rollouts with the teacher once"),
    "import": ("import_scores", "ImportConfig", "make a cache from another tool's scores"),
    "distill": ("distill", "DistillConfig", "train the student on the cache, without the teacher"),
    "plan": ("plan", "PlanConfig", "estimate peak training memory, and how to make it fit"),
    "eval": ("evaluate", "EvalConfig", "measure accuracy on prompts and the KL to a teacher"),
    "inspect": ("inspect", "InspectConfig", "show what a folder holds"),
    "verify": ("verify", "VerifyConfig", "check a folder, and a cache's noise with --rescore"),
    "declare": ("declare", "DeclareConfig", "admit a checkpoint that was fine-tuned elsewhere"),
    "run": ("run", "RunConfig", "run the unfinished stages of a recipe, in order"),
    "demo": ("demo", "DemoConfig", "run the whole pipeline at toy scale in a few minutes"),
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, _, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"lopd {__version__}: offline on-policy distillation",
            "",
            "usage: lopd COMMAND [--config FILE.yaml] [--flag value ...]",
            "",
            *lines,
            "",
            "`lopd COMMAND --help` lists the flags of a command; a YAML file has the same names.",
            "Every command accepts --rehash: hash models again instead of using stored hashes.",
        ]
    )


def run(argv: Sequence[str]) -> None:
    command, *rest = argv
    if command not in COMMANDS:
        check_keys([command], list(COMMANDS), "lopd", "command")
    from transformers.utils import logging

    from lopd.provenance import forget_fingerprints

    logging.disable_progress_bar()
    module_name, class_name, _ = COMMANDS[command]
    module = importlib.import_module(f"lopd.stages.{module_name}")
    if rest and command == "run" and not rest[0].startswith("-"):
        rest = ["--recipe", *rest]
    if "--rehash" in rest:
        rest.remove("--rehash")
        forget_fingerprints()
    file, flags = split_config(rest, command)
    settings = {} if file is None else load_yaml(file)
    where = file or f"lopd {command}"
    config = build_config(getattr(module, class_name), settings, flags, where, f"lopd {command}")
    done = module.main(config)
    _leave_process_group()
    if done is not None:
        print(f"lopd {command}: wrote {done}", file=sys.stderr)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM, which schedulers send, ends a command as SIGINT does: in order, with a message."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _leave_process_group() -> None:
    """Destroy the process group that accelerate opened for training under torchrun.

    Its threads would otherwise still run while the interpreter exits, which can abort a process
    whose work is done. Groups of others, such as vLLM's, are theirs to close.
    """
    state = sys.modules.get("accelerate.state")
    if state is not None and state.is_initialized():
        gc.collect()  # a wrapped model holds the group
        state.PartialState().destroy_process_group()


def split_config(words: Sequence[str], command: str) -> tuple[str | None, list[str]]:
    """The file of `--config FILE` or `--config=FILE`, and the remaining words."""
    file, flags = None, []
    rest = iter(words)
    for word in rest:
        name, _, value = word.partition("=")
        if name == "--config":
            file = value or next(rest, None)
            if file is None:
                raise ConfigError(f"lopd {command}: --config needs a file")
        else:
            flags.append(word)
    return file, flags


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns 0, or the exit code of an error that it prints in one line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(__version__)
        return 0
    try:
        with _sigterm_raises():
            run(argv)
    except (LopdError, OSError, ModuleNotFoundError) as error:
        print(f"lopd {argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) and error.orderly:
            _leave_process_group()
        kept = str(error) or (
            "what was finished (shards, checkpoints, stages) is kept; rerun the same command to "
            "continue"
        )
        print(f"lopd {argv[0]}: interrupted; {kept}", file=sys.stderr)
        return getattr(error, "exit_code", 128 + signal.SIGINT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
