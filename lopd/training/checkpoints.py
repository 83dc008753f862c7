"""Checkpoints of a run: sealing, finding the last whole one, rotation, and errors in writing.

A checkpoint is written to a temporary folder, sealed with a receipt and renamed to `checkpoint-N`.
Its receipt (`lopd.provenance.folder_receipt`) also names the run, so that a run removes only what
it wrote itself.
"""

import contextlib
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lopd.errors import LopdError, ShardError
from lopd.models.load import ADAPTER_CONFIG
from lopd.provenance.fingerprint import read_config, weight_files
from lopd.provenance.folder_receipt import (
    RECEIPT_NAME,
    check_receipt,
    files_below,
    read_receipt,
    seal,
)
from lopd.provenance.io import TEMP_SUFFIX, parse_json, sync_folder

LOG = logging.getLogger(__name__)

METRICS_NAME = "window.pt"  # metrics since the last log
STAGING = f".saving{TEMP_SUFFIX}"  # folder in which a checkpoint is written
TRAINER_STATE = "trainer_state.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STATE_FILES = ("scheduler.pt", METRICS_NAME)
OPTIMIZER = "optimizer.pt"
FSDP_FILES = ("pytorch_model_fsdp.bin", "optimizer.bin")  # both unsharded; accelerate gathers them
RANDOM_STATES = "rng_state*.pth"  # one per process
# In torch's messages about a file that cannot be written.
ZIP_WRITER = ("PytorchStreamWriter", "inline_container", "Parent directory", "iostream error")


@contextlib.contextmanager
def saving(path: str | Path) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into a ShardError that names `path`.

    safetensors and torch.save raise exceptions of their own for these, tokenizers a bare Exception.
    """
    try:
        yield
    except LopdError:
        raise
    except Exception as error:
        if not isinstance(error, OSError | RuntimeError | SafetensorError) and not (
            type(error) is Exception and "(os error " in str(error)  # Rust's name of an errno
        ):
            raise
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in ZIP_WRITER):
            raise  # for example a lost process, or a GPU out of memory
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ShardError(
            f"{path}: not written ({what}); finished checkpoints are intact: fix this and rerun "
            "the same command"
        ) from error


def finish(out: Path, step: int, run: str) -> Path:
    """Seal the checkpoint that was written to the staging folder, and give it its name.

    Args:
        out: folder of the run.
        step: number of the checkpoint.
        run: identity of the run, recorded in the receipt.

    Raises:
        OSError: the disk is full or fails.
        ShardError: a folder of this name is there that the run did not write.
    """
    staged, checkpoint = out / STAGING / f"checkpoint-{step}", out / f"checkpoint-{step}"
    seal(staged, files_below(staged), step=step, run=run)
    if checkpoint.exists():
        if _run_of(checkpoint) != run:
            raise ShardError(
                f"{checkpoint}: is there already, and this run did not write it; move it away"
            )
        _remove(checkpoint)
    os.replace(staged, checkpoint)
    sync_folder(out)
    shutil.rmtree(out / STAGING)
    return checkpoint


def rotate(out: Path, limit: int, run: str, best: int | None = None) -> None:
    """Remove the oldest checkpoints of this run until `limit` are left.

    The latest is never removed, nor is that of step `best`. Folders without a receipt of this run
    are neither counted nor removed.
    """
    ours = [folder for folder in checkpoints(out) if _run_of(folder) == run]
    protected = {ours[0], out / f"checkpoint-{best}"} if ours else set()
    surplus = max(0, len(ours) - max(limit, len(protected & {*ours})))
    for folder in [folder for folder in reversed(ours) if folder not in protected][:surplus]:
        _remove(folder)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that none is ever half there under its name."""
    going = checkpoint.with_name(f".{checkpoint.name}{TEMP_SUFFIX}")
    shutil.rmtree(going, ignore_errors=True)
    checkpoint.rename(going)
    shutil.rmtree(going)


def _run_of(checkpoint: Path) -> str | None:
    """The run that wrote a checkpoint; None if its receipt does not say so."""
    try:
        receipt = read_receipt(checkpoint)
    except ShardError:
        return None
    return receipt.get("run") if receipt.get("step") == step_of(checkpoint) else None


def checkpoints(out: Path) -> list[Path]:
    """Every `checkpoint-N` in the folder `out`, latest first, including torn ones."""
    folders = [item for item in out.glob("checkpoint-*") if item.is_dir()]
    numbered = [item for item in folders if re.fullmatch(r"checkpoint-\d+", item.name)]
    return sorted(numbered, key=step_of, reverse=True)


def last_checkpoint(out: Path, *, keep_best: bool = False) -> Path | None:
    """The latest checkpoint in the folder `out` that a run can continue from; None without one.

    Args:
        keep_best: whether the run ends with its best checkpoint, which must then be there as well.
    """
    return next((f for f in checkpoints(out) if not unusable(f, keep_best=keep_best)), None)


def unusable(checkpoint: Path, *, keep_best: bool = False) -> str:
    """Why a run cannot continue from a checkpoint; empty if it can.

    Every file is compared with the receipt. A checkpoint without one was written by an earlier
    version: its files are only checked for truncation.
    """
    try:
        if (checkpoint / RECEIPT_NAME).exists():
            receipt = check_receipt(checkpoint)
            if receipt.get("step") != step_of(checkpoint):
                return f"its receipt is that of step {receipt.get('step')}"
            state = parse_json((checkpoint / TRAINER_STATE).read_bytes(), finite=False)
        else:
            state = _unsealed_state(checkpoint)
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError, LopdError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    best = state.get("best_global_step")
    if keep_best and best and best != step_of(checkpoint):
        folder = checkpoint.with_name(f"checkpoint-{best}")
        if why := unusable(folder):
            return f"its best step is {best}, and {folder.name} cannot be used: {why}"
    return ""


def _unsealed_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint without a receipt, whose files are not truncated.

    Reads only JSON, the headers of the weights and the directories at the end of torch's files.
    """
    state = parse_json((checkpoint / TRAINER_STATE).read_bytes(), finite=False)
    if not isinstance(state, dict) or state.get("global_step") != step_of(checkpoint):
        raise ValueError(f"its state is not that of step {step_of(checkpoint)}")
    states = [*checkpoint.glob(RANDOM_STATES)]
    if not states:
        raise ValueError("it has no random state")
    optimizer = FSDP_FILES if (checkpoint / FSDP_FILES[0]).exists() else (OPTIMIZER,)
    for state_file in (*states, *(checkpoint / name for name in (*STATE_FILES, *optimizer))):
        with zipfile.ZipFile(state_file):
            pass
    adapted = (checkpoint / ADAPTER_CONFIG).exists()
    if adapted:
        parse_json((checkpoint / ADAPTER_CONFIG).read_bytes())
    else:
        read_config(checkpoint)
    for file in [checkpoint / ADAPTER_WEIGHTS] if adapted else weight_files(checkpoint):
        with safe_open(file, framework="numpy"):
            pass
    return state


def step_of(checkpoint: Path) -> int:
    """The step of a folder named `checkpoint-N`."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def put_aside(out: Path, checkpoint: Path | None, *, keep_best: bool = False) -> None:
    """Rename the checkpoints after `checkpoint`, which cannot be used, and print why.

    The run will write checkpoints with these names.

    Args:
        out: folder of the run.
        checkpoint: where the run continues; None if it starts from the beginning.
        keep_best: as in `last_checkpoint`.
    """
    for torn in checkpoints(out):
        if torn == checkpoint:
            break
        aside = out / f"torn-{torn.name}"
        number = 1
        while aside.exists():
            number += 1
            aside = out / f"torn-{torn.name}-{number}"
        why = unusable(torn, keep_best=keep_best)
        torn.rename(aside)
        LOG.warning(f"{out}: {torn.name} is put aside as {aside.name}: {why}")
    if checkpoint is None:
        return
    unchecked = ", which has no receipt (of an earlier version), so its files cannot be verified"
    if (checkpoint / RECEIPT_NAME).exists():
        unchecked = ""
    LOG.info(f"{out}: continues from {checkpoint.name}{unchecked}")
