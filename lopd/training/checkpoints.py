"""Checkpoints of a run: finding the last complete one, torn ones, and errors in writing."""

import contextlib
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lopd.errors import LopdError, ShardError
from lopd.models.load import ADAPTER_CONFIG
from lopd.provenance.fingerprint import weight_files
from lopd.provenance.io import parse_json

METRICS_NAME = "window.pt"  # metrics since the last log
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE_FILES = ("scheduler.pt", METRICS_NAME)
OPTIMIZER = "optimizer.pt"
FSDP_FILES = ("pytorch_model_fsdp.bin", "optimizer.bin")  # both unsharded; accelerate gathers them
RANDOM_STATES = "rng_state*.pth"  # one per process
ZIP_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory")  # in torch's messages


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into a ShardError that names `path`.

    safetensors and torch.save raise exceptions of their own for these.
    """
    try:
        yield
    except LopdError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in ZIP_WRITER):
            raise  # for example a lost process, or a GPU out of memory
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ShardError(
            f"{path}: not written ({what}); finished checkpoints are intact: fix this and rerun "
            "the same command"
        ) from error


def checkpoints(out: Path) -> list[Path]:
    """Every `checkpoint-N` in the folder `out`, latest first, including torn ones."""
    folders = [item for item in out.glob("checkpoint-*") if item.is_dir()]
    numbered = [item for item in folders if re.fullmatch(r"checkpoint-\d+", item.name)]
    return sorted(numbered, key=_step_of, reverse=True)


def last_checkpoint(out: Path) -> Path | None:
    """The latest complete `checkpoint-N` in the folder `out`; None if there is none."""
    return next((folder for folder in checkpoints(out) if is_whole(folder)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that resuming reads exists and is not truncated.

    Reads only the headers of the weights and the directories at the end of torch's zip files.
    """
    try:
        state = parse_json((checkpoint / "trainer_state.json").read_bytes(), finite=False)
        if not isinstance(state, dict) or state.get("global_step") != _step_of(checkpoint):
            return False
        states = [*checkpoint.glob(RANDOM_STATES)]
        if not states:
            return False
        optimizer = FSDP_FILES if (checkpoint / FSDP_FILES[0]).exists() else (OPTIMIZER,)
        names = (*STATE_FILES, *optimizer)
        for state_file in (*states, *(checkpoint / name for name in names)):
            with zipfile.ZipFile(state_file):
                pass
        adapted = (checkpoint / ADAPTER_CONFIG).exists()
        for file in [checkpoint / ADAPTER_WEIGHTS] if adapted else weight_files(checkpoint):
            with safe_open(file, framework="numpy"):
                pass
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError, LopdError):
        return False
    return True


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def put_torn_aside(out: Path, checkpoint: Path | None) -> None:
    """Rename torn checkpoints after `checkpoint`, remove unfinished ones, and print what happened.

    Otherwise the next rotation would keep them as the newest and remove complete ones, and files
    that a full disk cut short would keep it full.

    Args:
        out: folder of the run.
        checkpoint: where the run continues; None if it starts from the beginning.
    """
    for torn in checkpoints(out):
        if torn == checkpoint:
            break
        if not (torn / "trainer_state.json").exists():  # it is written last
            shutil.rmtree(torn)
            print(f"{out}: {torn.name} was never finished, removed", file=sys.stderr)
            continue
        aside = out / f"torn-{torn.name}"
        shutil.rmtree(aside, ignore_errors=True)
        torn.rename(aside)
        print(f"{out}: {torn.name} is torn, put aside as {aside.name}", file=sys.stderr)
    if checkpoint is not None:
        print(f"{out}: continues from {checkpoint.name}", file=sys.stderr)
