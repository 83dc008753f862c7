"""The checkpoints of a run: which are whole, and what becomes of those that are not."""

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lopd.errors import LopdError
from lopd.models.load import ADAPTER_CONFIG
from lopd.provenance.fingerprint import weight_files
from lopd.training.metrics import WINDOW_NAME

ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE_FILES = ("scheduler.pt", WINDOW_NAME)
OPTIMIZER = "optimizer.pt"
SHARDED = ("pytorch_model_fsdp.bin", "optimizer.bin")  # both whole, as accelerate gathers them
RANDOM_STATES = "rng_state*.pth"  # one a process


def checkpoints(out: Path) -> list[Path]:
    """Every `checkpoint-N` of a run, the latest first, torn ones too."""
    found = [item for item in out.glob("checkpoint-*") if item.is_dir()]
    numbered = [item for item in found if re.fullmatch(r"checkpoint-\d+", item.name)]
    return sorted(numbered, key=_step_of, reverse=True)


def last_checkpoint(out: Path) -> Path | None:
    """The latest `checkpoint-N` that was written to its end."""
    return next((folder for folder in checkpoints(out) if is_whole(folder)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that resuming reads is there and not cut short.

    Reads the headers of the weights and the directories at the end of torch's zip files.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        if not isinstance(state, dict) or state.get("global_step") != _step_of(checkpoint):
            return False
        states = [*checkpoint.glob(RANDOM_STATES)]
        if not states:
            return False
        optimizer = SHARDED if (checkpoint / SHARDED[0]).exists() else (OPTIMIZER,)
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
    """Say where the run continues; rename later, torn checkpoints, and remove unfinished ones.

    Otherwise the next rotation would take them for the newest and remove whole ones, and what a
    full disk cut short would go on filling it.
    """
    for torn in checkpoints(out):
        if torn == checkpoint:
            break
        if not (torn / "trainer_state.json").exists():  # which is written last
            shutil.rmtree(torn)
            print(f"{out}: {torn.name} was never finished, removed", file=sys.stderr)
            continue
        aside = out / f"torn-{torn.name}"
        shutil.rmtree(aside, ignore_errors=True)
        torn.rename(aside)
        print(f"{out}: {torn.name} is torn, put aside as {aside.name}", file=sys.stderr)
    if checkpoint is not None:
        print(f"{out}: continues from {checkpoint.name}", file=sys.stderr)
