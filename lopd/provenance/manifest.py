"""Manifests: typed descriptions of artefacts, and the file that holds one in each folder."""

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, overload

from lopd.errors import ConfigError, DataError, LopdError, MissingFileError
from lopd.provenance.found import MANIFEST_NAME as MANIFEST_NAME
from lopd.provenance.found import RECIPE_NAME as RECIPE_NAME
from lopd.provenance.found import WRITERS, found_at
from lopd.provenance.io import (
    json_digest,
    make_folder,
    parse_json,
    pretty_json,
    storing,
    write_atomic,
)
from lopd.provenance.scoring import Scoring, parse_scoring
from lopd.provenance.typed_json import Unfit, parse, plain, value_at

SCHEMA = 1
DIGEST = "sha256"
KINDS = (*WRITERS,)
KEYS = ("config", "model", "base", "sampling", "inputs", "lineage", "overrides", "plan")
_SEQUENCES = ("model.path", "model.tokenizer", "model.vocab_size", "plan.shards")
# Required keys besides the fields of the kind's class; "a.b" is key b of the object under a, and
# of "a or b" one is enough.
REQUIRED = {
    "sft_data": _SEQUENCES,
    "rollouts": _SEQUENCES,
    "cache": _SEQUENCES,
    "checkpoint": (),
    "evaluation": ("inputs.prompts.sha256 or inputs.cache.digest",),
}
_COUNT, _MASS = {"within": "[1, inf)"}, {"within": "(0, 1]"}  # metadata of fields
_PACKAGES = ("lopd", "torch", "transformers", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """A model: the sha256 digests of its parts, where it was, and how it was run."""

    weights: str
    path: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    behaviour: Mapping[str, Any] | None = None  # `behaviour_of`; None: unknown, an older artefact
    eos_ids: tuple[int, ...] | None = None  # that end an answer; None: unknown
    hub: str | None = None  # org/name@revision
    vocab_size: int | None = field(default=None, metadata=_COUNT)
    dtype: str | None = None
    engine: str | None = None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ModelIdentity":
        """The model that a JSON object describes; ConfigError if it does not name the weights."""
        return parse(cls, value, "model.", _unfit("manifest", "model", ConfigError))

    def as_teacher(self) -> dict[str, Any]:
        """The JSON by which a lineage identifies a teacher."""
        names = ("weights", "tokenizer", "path", "behaviour", "eos_ids")
        return {name: plain(getattr(self, name)) for name in names}

    def __str__(self) -> str:
        return f"{self.path or 'a model'} (weights {short(self.weights)})"


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How answers were sampled; None for unknown values."""

    max_new_tokens: int | None = field(default=None, metadata=_COUNT)
    num_samples: int | None = field(default=None, metadata=_COUNT)
    seed: int | None = None
    temperature: float | None = field(default=None, metadata={"within": "[0, inf)"})
    top_p: float | None = field(default=None, metadata=_MASS)
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """Whose answers a checkpoint was fine-tuned on."""

    sft_teacher: ModelIdentity | None = None  # None: unknown
    sft_teachers: Mapping[str, ModelIdentity] | None = None  # by name, where there are several
    declared: bool = False  # stated by a person with `lopd declare`, not recorded by a stage
    initial_student: str | None = None  # weights that a distillation began from
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Override:
    """A mismatch that a flag, or a calibration of the cache, allowed."""

    name: str
    found: str
    expected: str


@dataclass(frozen=True, kw_only=True)
class ScoredRollouts:
    """The rollouts that a cache holds the scores of."""

    digest: str
    model: ModelIdentity
    lineage: Lineage | None = None
    sampling: SamplingSettings | None = None
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of an artefact of any kind.

    `raw` is the JSON object on disk, unknown keys included; digests are computed from it. Reports
    for people (`training`, `holdout`, `seconds`, ...) are only there.
    """

    kind: str
    stage: str
    config: Mapping[str, Any]
    model: ModelIdentity
    inputs: Mapping[str, Any]  # what the stage read, by name; `identity.digests_of`
    base: ModelIdentity | None = None  # that training began from
    sampling: SamplingSettings | None = None
    lineage: Lineage | None = None
    overrides: tuple[Override, ...] = ()
    declared: bool = False  # the models that scored and rolled out are not verified
    shards: tuple[int, ...] = field(default=(), metadata={"at": "plan.shards"})  # sequences of each
    teachers: Mapping[str, ModelIdentity] | None = None  # by name; `model` stands for all of them
    shard_teachers: tuple[str, ...] = field(default=(), metadata={"at": "plan.teachers"})
    scoring: Scoring
    digest: str | None = field(default=None, compare=False)  # of `raw`, as its file says
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's head; always known for folders of sequences."""
        assert self.model.vocab_size is not None
        return self.model.vocab_size

    @property
    def models(self) -> dict[str | None, ModelIdentity]:
        """The models that sampled or scored the sequences: by name, or one under None."""
        return {None: self.model} if self.teachers is None else dict(self.teachers.items())

    def teacher_of(self, shard: int) -> str | None:
        """The name of the teacher of a shard's sequences; None if it has none."""
        return self.shard_teachers[shard] if self.shard_teachers else None


@dataclass(frozen=True, kw_only=True)
class PromptRecords:
    """The records that a template was rendered for, and how their prompts were read."""

    path: str
    reading: Mapping[str, Any]
    limit: int | None = None
    imported: bool


@dataclass(frozen=True, kw_only=True)
class TeacherPromptsInput:
    """The prompts that the teacher read in place of the student's."""

    digest: str  # of all of them
    date: str
    template: str = field(metadata={"at": "template.sha256"})
    text: str = field(metadata={"at": "template.text"})
    file: str = field(metadata={"at": "template.path"})
    records: PromptRecords
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class CacheManifest(Manifest):
    """The manifest of a teacher cache; `model` is the teacher."""

    k: int = field(metadata={"within": "[0, inf)"})  # 0: only the sampled tokens are scored
    top_p: float = field(metadata=_MASS)
    codec: str
    temperature: float = field(metadata={"within": "(0, inf)"})
    rollouts: ScoredRollouts = field(metadata={"at": "inputs.rollouts"})
    teacher_prompts: TeacherPromptsInput | None = field(  # None: it read the student's
        default=None, metadata={"at": "inputs.teacher_prompts"}
    )

    @property
    def teacher_template(self) -> str | None:
        """sha256 of the template of the teacher's own prompts; None if it read the student's."""
        return None if self.teacher_prompts is None else self.teacher_prompts.template

    @property
    def teacher_k(self) -> int:
        """How many of the teacher's most probable ids a list begins with, before `top_p`."""
        return 0 if self.scoring.list_of == "student" else self.k

    @property
    def most_listed(self) -> int:
        """Entries of the longest list that can be, without the sampled token."""
        support = self.scoring.support
        extra = 0 if support is None else support.extra_ids + len(support.eos_class)
        return min(self.k + extra, self.vocab_size)


@overload
def build_manifest(
    kind: Literal["cache"], *, stage: str, config: Any, **parts: Any
) -> CacheManifest: ...
@overload
def build_manifest(kind: str, *, stage: str, config: Any, **parts: Any) -> Manifest: ...
def build_manifest(
    kind: str,
    *,
    stage: str,
    config: Any,
    **parts: Any,
) -> Manifest:
    """The manifest of an artefact that is about to be written.

    Args:
        config: the stage's settings, for people to read; not part of the recipe.
        parts: what decides the content of the artefact: `model`, `base`, `sampling`, `inputs`,
            `lineage`, `overrides`, `plan` and further keys. A stage that is resumed compares these
            (`lopd.provenance.identity`). Dataclasses are written as JSON.

    Raises:
        ConfigError: an unknown kind, a key that is taken, or a part that the kind needs is missing.
    """
    if kind not in KINDS:
        raise ConfigError(f"manifest kind '{kind}' is unknown; use one of {', '.join(KINDS)}")
    always = {
        "schema": SCHEMA,
        "kind": kind,
        "stage": stage,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(),
        "config": config,
    }
    clash = sorted(always.keys() & parts.keys())
    if clash:
        raise ConfigError(f"manifest key '{clash[0]}' is taken; give the extra key another name")
    values = {**dict.fromkeys(KEYS), "overrides": (), **parts, **always}
    values["inputs"] = values["inputs"] or {}
    # Converted to JSON and back, so that what is compared now is what will be read.
    return parse_manifest(json.loads(pretty_json(plain(values))))


def write_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Write `manifest.json` into `folder`, which is created if necessary, with its own digest.

    Raises:
        ShardError: the file cannot be written, e.g. on a full disk.
    """
    file = Path(folder) / MANIFEST_NAME
    with storing(file):
        make_folder(file.parent)
        write_atomic(file, pretty_json({**manifest.raw, DIGEST: json_digest(manifest.raw)}))
    return file


def check_digest(manifest: Manifest, folder: str | Path) -> None:
    """Compare a manifest that was read with the digest in its file, if it has one.

    Raises:
        DataError: the manifest was altered.
    """
    found = json_digest(manifest.raw)
    if manifest.digest not in (None, found):
        raise DataError(
            f"{Path(folder) / MANIFEST_NAME}: altered since it was written, its digest is "
            f"{found[:12]} and says {str(manifest.digest)[:12]}; restore it, or redo the stage"
        )


@overload
def read_manifest(folder: str | Path, kind: Literal["cache"]) -> CacheManifest: ...
@overload
def read_manifest(folder: str | Path, kind: str | None = None) -> Manifest: ...
def read_manifest(folder: str | Path, kind: str | None = None) -> Manifest:
    """The manifest of an artefact folder.

    Args:
        kind: the kind that is expected; None admits any.

    Raises:
        MissingFileError: no such folder or no manifest in it.
        DataError: not a manifest, an incomplete one, or one of a newer version of lopd.
        ConfigError: an artefact of another kind.
    """
    file = Path(folder) / MANIFEST_NAME
    if not file.exists():
        what = found_at(folder)
        if Path(folder).is_dir():
            what = f"{what}; it has no {MANIFEST_NAME}"
        writes = "a lopd stage" if kind is None else WRITERS[kind]
        raise MissingFileError(f"{folder}: {what}; name a folder that {writes} has written")
    try:
        raw = parse_json(file.read_bytes())
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); restore it or redo the stage") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); restore it") from error
    if not isinstance(raw, dict) or raw.get("kind") not in KINDS:
        raise DataError(f"{file} is not a lopd manifest; restore it or redo the stage")
    if raw.get("schema") != SCHEMA:
        raise DataError(
            f"{file} has schema {raw.get('schema')!r}, expected {SCHEMA}; "
            "read it with the version of lopd that wrote it"
        )
    if kind is not None and raw["kind"] != kind:
        raise ConfigError(
            f"{folder} holds '{raw['kind']}', expected '{kind}'; name a folder that "
            f"{WRITERS[kind]} has written"
        )
    digest = raw.pop(DIGEST, None)
    return replace(parse_manifest(raw, str(file), DataError), digest=digest)


def parse_manifest(
    raw: Mapping[str, Any], source: str = "manifest", error: type[LopdError] = ConfigError
) -> Manifest:
    """The typed manifest of a JSON object.

    Args:
        source: what messages call the object: its file.
        error: the exception for a field that is missing or has another type.
    """
    unfit = _unfit(source, raw["kind"], error)
    absent = [key for key in KEYS if key not in raw]
    absent += [
        keys
        for keys in REQUIRED[raw["kind"]]
        if all(value_at(raw, key) is None for key in keys.split(" or "))
    ]
    if absent:
        raise unfit(absent[0])
    scoring = parse_scoring(raw, source, error, unfit)
    kind = CacheManifest if raw["kind"] == "cache" else Manifest
    manifest = parse(kind, raw, "", unfit, scoring=scoring)
    if value_at(raw, "plan.shards") is not None and min(manifest.shards, default=0) < 1:
        raise error(
            f"{source} has plan.shards {list(manifest.shards)}; expected 1 or more sequences in "
            "each of one or more shards"
        )
    named = None if manifest.teachers is None else {*manifest.teachers}
    if named is not None and len(manifest.shard_teachers) != len(manifest.shards):
        raise unfit("plan.teachers")
    if unknown := sorted({*manifest.shard_teachers} - (named or set())):
        raise unfit(f"teachers.{unknown[0]}")
    return manifest


def short(digest: Any) -> str:
    """The first 12 hex digits, which is what messages show."""
    return str(digest)[:12] if digest else "unknown"


def _unfit(source: str, kind: str, error: type[LopdError]) -> Unfit:
    return lambda name: error(
        f"{source} has no {name}, which a manifest of '{kind}' needs; restore it or redo the stage"
    )


def environment() -> dict[str, str]:
    """The versions of Python and of the packages that decide a result, and torch's threads."""
    versions = {"python": platform.python_version()}
    if (torch := sys.modules.get("torch")) is not None:
        versions["threads"] = str(torch.get_num_threads())
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
