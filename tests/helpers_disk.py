"""A disk that may lose its power: which files and names would be there afterwards."""

import json
import os
from pathlib import Path

from lopd.provenance.io import TEMP_SUFFIX

# Names that carry no result; their loss costs nothing.
PASSING = (".lock", ".start.lock", "train_log.jsonl")
# Files of which each stands for others, or for a run.
OURS = ("manifest.json", "receipt.json", "recipe.json", "results.json")


class Disk:
    """Records, below `root`, what has been synced, and checks the order of names.

    A name is safe once its folder has been synced after the name appeared; contents are safe once
    the file itself has been synced. `faults` lists the promises that would break:

    * a shard, a JSON file of ours or a checkpoint gets its name before its contents are safe;
    * `receipt.json` is named before every file that it lists is safe;
    * a receipt is named before its shard is safe, or before an older receipt is safely gone;
    * `manifest.json` of a model or an evaluation is named before everything beside it is safe.
    """

    def __init__(self, root: Path, monkeypatch) -> None:
        self.root = root
        self.faults: list[str] = []
        self._synced: set[int] = set()
        self._pending: dict[str, set[str]] = {}
        self._real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink", "mkdir")}
        for name in ("fsync", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._rename)

    def check_everything(self) -> None:
        """Add a fault for every file and name that is not safe now."""
        for path in sorted(self.root.rglob("*")):
            self._require(path, "at the end")

    def _fsync(self, descriptor) -> None:
        self._real["fsync"](descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._synced.add(os.fstat(descriptor).st_ino)
        if os.path.isdir(path):
            self._pending.pop(path, None)

    def _mkdir(self, path, *args, **kwargs) -> None:
        self._real["mkdir"](path, *args, **kwargs)
        self._change(path)

    def _unlink(self, path, *args, **kwargs) -> None:
        self._real["unlink"](path, *args, **kwargs)
        self._change(path)

    def _rename(self, source, target, **kwargs) -> None:
        source, target = Path(source), Path(target)
        if self._watches(target):
            binding = target.name.startswith("shard-") or target.name in OURS
            files = [source] if binding else source.rglob("*") if source.is_dir() else ()
            if TEMP_SUFFIX in target.name:  # on its way out
                files = ()
            for path in files:
                if path.is_file() and path.stat().st_ino not in self._synced:
                    self.faults.append(f"{target.name} is named before {path.name} is safe")
            if target.name == "receipt.json":
                for name in json.loads(source.read_bytes())["files"]:
                    self._require(target.parent / name, "when its receipt is named")
            if target.name.startswith("shard-") and target.suffix == ".safetensors":
                self._require(target.with_suffix(".json"), f"when {target.name} is named")
                self._require(target.with_name("manifest.json"), f"when {target.name} is named")
            elif target.name.startswith("shard-"):
                self._require(target.with_suffix(".safetensors"), f"when {target.name} is named")
            elif target.name == "manifest.json":
                for path in target.parent.iterdir():
                    if path not in (source, target):
                        self._require(path, "when manifest.json is named")
        self._real["replace"](source, target, **kwargs)
        self._change(source)
        self._change(target)

    def _require(self, path: Path, when: str) -> None:
        if path.name in PASSING or path.suffix == ".lock":
            return
        if path.name in self._pending.get(str(path.parent), ()):
            self.faults.append(f"the name {path.relative_to(self.root)} is not safe {when}")
        if path.is_file() and path.stat().st_ino not in self._synced:
            self.faults.append(f"the contents of {path.relative_to(self.root)} are not safe {when}")

    def _watches(self, path: Path) -> bool:
        return path.is_relative_to(self.root)

    def _change(self, path) -> None:
        path = Path(path)
        if self._watches(path):
            self._pending.setdefault(str(path.parent), set()).add(path.name)
