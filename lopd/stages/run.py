"""Run the missing stages of a recipe, in order (`lopd run recipe.yaml`).

    out: runs/mine            # each stage writes to a folder of its name here
    teacher: models/teacher   # answers the prompts and scores the rollouts
    student: models/base      # is fine-tuned
    device: cuda              # shared settings of the stages: device, seed, and dtype,
    dtype: bfloat16           # which applies to sampling, scoring and evaluation only
    stages:
      sft-data: {prompts: sft.jsonl}
      sft: {learning_rate: 8.0e-5}
      rollout: {prompts: opd.jsonl}
      score: {k: 64}
      distill: {}
      eval: {prompts: test.jsonl}

The output, model and data of a stage follow from the other stages and can be set by hand.
Without `sft`, `student` must be fine-tuned already. With `extra_ids`, `score` uses the student
that rolls out. Finished stages are skipped; if the settings or inputs of a finished stage have
changed, the run stops with an error, and nothing is reused or overwritten.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from lopd.config.dtype import with_dtype
from lopd.config.parse import build_config, check_keys, load_yaml
from lopd.config.run import RunConfig
from lopd.errors import ConfigError
from lopd.provenance import (
    MANIFEST_NAME,
    describe_model,
    difference,
    digests_of,
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
# Stages without the shared dtype: weights and optimizer need more bits than inference.
TRAINING_STAGES = ("sft", "distill")


def main(config: RunConfig) -> Path:
    """Run the stages that are not finished; returns the recipe's output folder.

    Raises:
        ConfigError: an invalid recipe, several processes, or a finished stage whose settings or
            inputs have changed.
        LopdError: what the stages raise.
    """
    if not (worker := this_worker(None)).is_single:
        raise ConfigError(
            f"RANK/WORLD_SIZE: found {worker}; expected one process for a recipe; "
            "start 'lopd rollout' and 'lopd score' with torchrun instead"
        )
    recipe = load_yaml(config.recipe)
    for name, stage_config in stage_configs(recipe, config.recipe).items():
        module, _ = STAGES[name]
        stage_config = with_dtype(stage_config)
        if is_finished(stage_config):
            print(f"{name}: done, {stage_config.out}")
        else:
            print(f"{name}: running, {stage_config.out}")
            module.main(stage_config)
    return Path(recipe["out"])


def stage_configs(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """Build and check the config of each stage of a recipe before any stage runs.

    Args:
        source: name of the recipe in error messages.

    Raises:
        ConfigError: an unknown, missing or invalid key.
    """
    _check_recipe(recipe, source)
    configs = {}
    for name, (_, config_class) in STAGES.items():
        if name not in recipe["stages"]:
            continue
        shared = {key: recipe[key] for key in SHARED if key in recipe}
        if name in TRAINING_STAGES:
            shared.pop("dtype", None)
        known = {item.name for item in fields(config_class)}
        implied = implied_settings(name, recipe) | shared
        chosen = {key: value for key, value in implied.items() if key in known}
        chosen |= recipe["stages"][name] or {}
        where = f"{source}: stages: {name}"
        configs[name] = build_config(config_class, chosen, [], where, f"lopd {name}")
    return configs


def _check_recipe(recipe: dict[str, Any], source: str) -> None:
    check_keys(recipe, ["out", "teacher", "student", *SHARED, "stages"], source)
    for key in ("out", "teacher", "student", "stages"):
        if key not in recipe:
            raise ConfigError(f"{source}: '{key}' is missing; see the top of lopd/stages/run.py")
    for key in ("out", "teacher", "student"):
        if not isinstance(recipe[key], str) or not recipe[key]:
            raise ConfigError(f"{source}: '{key}' is {recipe[key]!r}; expected a folder")
    stages = recipe["stages"]
    if not isinstance(stages, dict) or not stages:
        raise ConfigError(
            f"{source}: 'stages' is {stages!r}; expected a mapping with some of {', '.join(STAGES)}"
        )
    check_keys(stages, list(STAGES), f"{source}: stages")
    for name, settings in stages.items():
        where = f"{source}: stages: {name}"
        if not isinstance(settings, dict | None):
            raise ConfigError(f"{where}: expected a mapping of settings")
        if settings and not isinstance(settings.get("out", ""), str):
            raise ConfigError(f"{where}: 'out' is {settings['out']!r}; expected a folder")
        if settings and settings.get("plan"):
            raise ConfigError(
                f"{where}: 'plan' writes nothing for later stages to read; run "
                "'lopd score --plan' instead"
            )


def implied_settings(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The output folder and the inputs of a stage that follow from the rest of the recipe."""

    def out(stage: str) -> str:
        return str((recipe["stages"].get(stage) or {}).get("out", Path(recipe["out"]) / stage))

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


def is_finished(config: Any) -> bool:
    """Whether a stage's output is complete and was made with these settings from these inputs.

    False for stores of sequences, whose stages find their missing shards themselves.

    Raises:
        ConfigError: the output is complete, and its settings or inputs have changed.
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
        recorded = digests_of({"model": start, **manifest.inputs})
        expected = input_digests(config)
        changed = difference({key: recorded.get(key) for key in expected}, expected)
    if changed:
        OutputFolder(out, "other recipe", changed).require_writable()
    return True


def input_digests(config: Any) -> dict[str, str | None]:
    """Digests of what a training or evaluation stage would read now, its model included."""
    (module,) = (module for module, config_class in STAGES.values() if type(config) is config_class)
    model = config.student if module is distill else config.model
    found = describe_model(model, dtype=config.dtype, engine="transformers")
    return digests_of({"model": found, **module.describe_inputs(config)})
