"""Run the missing stages of a recipe, in order (`lopd run recipe.yaml`).

    out: runs/mine            # every stage writes a folder of its own name here
    teacher: models/teacher   # answers the prompts, and scores the rollouts
    student: models/base      # what is fine-tuned
    device: cuda              # settings that several stages share: device, seed, and
    dtype: bfloat16           # the dtype of sampling, scoring and evaluation
    stages:
      sft-data: {prompts: sft.jsonl}
      sft: {learning_rate: 8.0e-5}
      rollout: {prompts: opd.jsonl}
      score: {k: 64}
      distill: {}
      eval: {prompts: test.jsonl}

A stage's folder, model and data follow from the stages before it and can be set by hand.
Without `sft`, `student` is the fine-tuned one; `extra_ids` of score are those of the student that
rolls out. What is finished is left alone; a finished stage whose settings or inputs have changed
since is refused, never reused or overwritten.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lopd.config.fields import Settings, setting
from lopd.config.parse import build_config, check_keys, load_yaml
from lopd.errors import ConfigError
from lopd.provenance import (
    MANIFEST_NAME,
    difference,
    digests_of,
    fingerprint_weights,
    read_manifest,
    settings_identity,
)
from lopd.stages import distill, evaluate, rollout, score, sft, sft_data
from lopd.store.folders import OutputFolder
from lopd.store.workers import this_worker

STAGES: dict[str, tuple[Any, type]] = {
    "sft-data": (sft_data, sft_data.SftDataConfig),
    "sft": (sft, sft.SftConfig),
    "rollout": (rollout, rollout.RolloutConfig),
    "score": (score, score.ScoreConfig),
    "distill": (distill, distill.DistillConfig),
    "eval": (evaluate, evaluate.EvalConfig),
}
SHARED = ["dtype", "device", "seed"]
# Their dtype is that of weights and optimizer, which wants more bits than inference does.
TRAINING = ("sft", "distill")


@dataclass(kw_only=True)
class RunConfig(Settings):
    """Run the stages of a recipe that are not finished, in order (`lopd run recipe.yaml`)."""

    recipe: str = setting(help="YAML file; see lopd/stages/run.py for its keys.")


def main(config: RunConfig) -> Path:
    if not (worker := this_worker(None)).alone:
        raise ConfigError(
            f"RANK/WORLD_SIZE: found {worker}; expected one process for a recipe; start "
            "lopd rollout and lopd score themselves by torchrun"
        )
    recipe = load_yaml(config.recipe)
    configs = plan(recipe, config.recipe)
    for name, settings in configs.items():
        module, _ = STAGES[name]
        if finished(settings):
            print(f"{name}: done, {settings.out}")
        else:
            print(f"{name}: running, {settings.out}")
            module.main(settings)
    return Path(recipe["out"])


def plan(recipe: dict[str, Any], where: str) -> dict[str, Any]:
    """The config of every stage that the recipe names, checked before anything runs."""
    check_keys(recipe, ["out", "teacher", "student", *SHARED, "stages"], where)
    for key in ("out", "teacher", "student", "stages"):
        if key not in recipe:
            raise ConfigError(f"{where}: '{key}' is missing; see the head of lopd/stages/run.py")
    for key in ("out", "teacher", "student"):
        if not isinstance(recipe[key], str) or not recipe[key]:
            raise ConfigError(f"{where}: '{key}' is {recipe[key]!r}; expected a folder's name")
    given = recipe["stages"]
    if not isinstance(given, dict) or not given:
        raise ConfigError(
            f"{where}: 'stages' is {given!r}; expected a mapping of some of {', '.join(STAGES)}"
        )
    check_keys(given, list(STAGES), f"{where}: stages")
    for name, settings in given.items():
        if not isinstance(settings, dict | None):
            raise ConfigError(f"{where}: stages: {name}: expected a mapping of settings")
        if settings and not isinstance(settings.get("out", ""), str):
            raise ConfigError(f"{where}: stages: {name}: 'out' is not a folder's name")
        if settings and settings.get("plan"):
            raise ConfigError(
                f"{where}: stages: {name}: 'plan' writes nothing for later stages to read; call "
                "'lopd score --plan' by itself"
            )
    configs = {}
    for name in STAGES:
        if name in given:
            settings = given[name] or {}
            _, config_class = STAGES[name]
            known = {item.name for item in fields(config_class)}
            shared = {key: recipe[key] for key in SHARED if key in recipe}
            if name in TRAINING:
                shared.pop("dtype", None)
            implied = wiring(name, recipe) | shared
            chosen = {key: value for key, value in implied.items() if key in known} | settings
            configs[name] = build_config(
                config_class, chosen, [], f"{where}: stages: {name}", f"lopd {name}"
            )
    return configs


def wiring(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The inputs and the folder that a stage gets from the recipe's other stages."""

    def out(of: str) -> str:
        return str((recipe["stages"].get(of) or {}).get("out", Path(recipe["out"]) / of))

    student = out("sft") if "sft" in recipe["stages"] else recipe["student"]
    extra_ids = (recipe["stages"].get("score") or {}).get("extra_ids")
    return {"out": out(name)} | {
        "sft-data": {"teacher": recipe["teacher"]},
        "sft": {"model": recipe["student"], "data": out("sft-data")},
        "rollout": {"student": student},
        "score": {
            "teacher": recipe["teacher"],
            "rollouts": out("rollout"),
            "student": student if extra_ids else None,
        },
        "distill": {"student": student, "cache": out("score")},
        "eval": {
            "model": out("distill") if "distill" in recipe["stages"] else student,
            "teacher": recipe["teacher"],
        },
    }[name]


def finished(config: Any) -> bool:
    """Whether a stage's product is there, whole, made with these settings from these inputs.

    Stores of sequences count their shards themselves when their stage is called, so only
    stages whose manifest is their last file are answered for here.

    Raises:
        ConfigError: the settings or the inputs of a finished product have changed since.
    """
    out = Path(config.out)
    if not (out / MANIFEST_NAME).is_file():
        return False
    manifest = read_manifest(out)
    if manifest.kind not in ("checkpoint", "evaluation"):
        return False
    expected = settings_identity(config)
    recorded = settings_identity(config, manifest.config)
    changed = difference({key: recorded.get(key) for key in expected}, expected)
    if not changed:
        start = manifest.base or manifest.model
        recorded = {"model": start.weights, **digests_of(manifest.inputs)}
        expected = input_digests(config)
        changed = difference({key: recorded.get(key) for key in expected}, expected)
    if changed:
        OutputFolder(out, "other recipe", changed).require_writable()
    return True


def input_digests(config: Any) -> dict[str, str | None]:
    """The content digests of what a training or evaluation stage reads, its model included."""
    (module,) = (module for module, config_class in STAGES.values() if type(config) is config_class)
    model = config.student if module is distill else config.model
    return {"model": fingerprint_weights(model), **digests_of(module.describe_inputs(config))}
