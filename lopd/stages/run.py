"""Run the missing stages of a recipe, in order (`lopd run recipe.yaml`).

`lopd.config.run.RECIPE`, which `lopd run --help` prints, shows the keys. The output, model and data
of a stage follow from the other stages and can be set by hand. Without `sft`, `student` must be
fine-tuned already. If lists hold the student's ids, `score` uses the student that rolls out. With
`distill`, `eval` also measures the student before, in `eval-student`, unless it names its `model`;
the run ends with the results. `eval` on a cache without prompts needs no teacher. Finished stages
are skipped; if the settings or inputs of a finished stage have changed, the run stops with an
error, and nothing is reused or overwritten.
"""

import logging
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from lopd.config.distill import DistillConfig
from lopd.config.dtype import with_dtype
from lopd.config.evaluate import EvalConfig
from lopd.config.parse import build_config, check_keys, underscored
from lopd.config.rollout import RolloutConfig
from lopd.config.run import RunConfig
from lopd.config.score import ScoreConfig
from lopd.config.sft import SftConfig
from lopd.config.sft_data import SftDataConfig
from lopd.config.strict_yaml import load_yaml
from lopd.config.values import typed
from lopd.data.records import data_files
from lopd.engines.progress import duration
from lopd.errors import ConfigError, LopdError, MissingFileError
from lopd.models.load import check_model_folder
from lopd.provenance import MANIFEST_NAME, read_manifest
from lopd.provenance.found import found_at
from lopd.provenance.remote_code import trusting_code
from lopd.stages import distill, evaluate, finished, rollout, score, sft, sft_data
from lopd.stages.model_access import MODELS, local_models
from lopd.stages.table import print_fields
from lopd.store import RolloutStore, TeacherCache
from lopd.store.workers import this_worker

LOG = logging.getLogger(__name__)
STAGES: dict[str, tuple[Any, type]] = {
    "sft-data": (sft_data, SftDataConfig),
    "sft": (sft, SftConfig),
    "rollout": (rollout, RolloutConfig),
    "score": (score, ScoreConfig),
    "distill": (distill, DistillConfig),
    "eval": (evaluate, EvalConfig),
}
# Teacher and student should get the same prompts. `sft` reads what sft-data made of them.
PROMPTS = ["chat_template_kwargs", "special_tokens", "prompt_date"]
SHARED = ["dtype", "device", "seed", "trust_remote_code", *PROMPTS]
# Stages without the shared dtype: weights and optimizer need more bits than inference.
TRAINING_STAGES = ("sft", "distill")
BEFORE = "-student"  # added to the name of the evaluation of the student that is distilled


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
    configs = stage_configs(recipe, config.recipe)
    check_inputs(configs, config.recipe)
    said: set[tuple[str, str]] = set()  # choices of a dtype that were printed
    for name, stage in configs.items():
        choice = (stage.dtype, stage.device)
        configs[name] = with_dtype(stage, quiet=choice in said)
        said.add(choice)
    began = time.monotonic()
    for number, (name, stage_config) in enumerate(configs.items(), start=1):
        with trusting_code(stage_config.trust_remote_code):
            done = is_finished(stage_config)
        shown = done or _is_complete(Path(stage_config.out))
        state, spent = "done" if shown else "running", duration(time.monotonic() - began)
        LOG.info(f"[{number}/{len(configs)}] {name}: {state}, {stage_config.out} ({spent} so far)")
        if not done:
            _module(stage_config).main(stage_config)
    results = {
        f"{name}, {config.model}": evaluate.headline(Path(config.out))
        for name, config in configs.items()
        if isinstance(config, EvalConfig)
    }
    if results:
        print("\nresults")
        print_fields(results)
    return Path(recipe["out"])


def _module(config: Any) -> Any:
    """The module of lopd.stages that a config belongs to."""
    (module,) = (module for module, config_class in STAGES.values() if type(config) is config_class)
    return module


def _is_complete(out: Path) -> bool:
    """Whether a folder of shards misses none; its stage still compares the recipe."""
    kind = read_manifest(out).kind if (out / MANIFEST_NAME).is_file() else None
    if kind == "cache":
        return not TeacherCache.open(out, allow_incomplete=True).missing_shards
    if kind in ("sft_data", "rollouts"):
        return not RolloutStore.open(out, kind, allow_incomplete=True).missing_shards
    return False


def stage_configs(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """Build and check the config of each stage of a recipe before any stage runs.

    Args:
        source: name of the recipe in error messages.

    Raises:
        ConfigError: an unknown, missing or invalid key.
    """
    recipe = _respelled(recipe, source)
    _check_recipe(recipe, source)
    recipe = recipe | {name: local_models(recipe[name]) for name in ("teacher", "student")}
    configs: dict[str, Any] = {}
    for name, (_, config_class) in STAGES.items():
        if name not in recipe["stages"]:
            continue
        shared = {key: recipe[key] for key in SHARED if key in recipe}
        if name in TRAINING_STAGES:
            shared.pop("dtype", None)
        if name == "sft" and "data" not in (recipe["stages"][name] or {}):
            shared = {key: value for key, value in shared.items() if key not in PROMPTS}
        known = {item.name for item in fields(config_class)}
        implied = implied_settings(name, recipe) | shared
        chosen = {key: value for key, value in implied.items() if key in known}
        chosen |= recipe["stages"][name] or {}
        where = f"{source}: stages: {name}"
        if (
            name == "eval"
            and "distill" in configs
            and "model" not in (recipe["stages"][name] or {})
        ):
            before = {"model": configs["distill"].student, "out": f"{chosen['out']}{BEFORE}"}
            configs[f"{name}{BEFORE}"] = build_config(
                config_class, chosen | before, {}, where, f"lopd {name}"
            )
        configs[name] = build_config(config_class, chosen, {}, where, f"lopd {name}")
    return configs


def check_inputs(configs: dict[str, Any], source: str) -> None:
    """Check that the models and files exist which no stage writes, before any stage runs.

    Raises:
        LopdError: one does not.
    """
    written = {Path(config.out).resolve() for config in configs.values()}

    def is_written(folder: str) -> bool:
        return Path(folder).resolve() in written

    for name, config in configs.items():
        try:
            for setting in MODELS:
                models = getattr(config, setting, None)
                for model in models.values() if isinstance(models, dict) else (models,):
                    if model is not None and not is_written(model):
                        check_model_folder(local_models(model))
            if (prompts := getattr(config, "prompts", None)) is not None:
                data_files(prompts)
            for setting in ("data", "rollouts", "cache"):
                folder = getattr(config, setting, None)
                if folder is not None and not is_written(folder) and not Path(folder).exists():
                    raise MissingFileError(f"{setting}: {folder}: {found_at(folder)}")
        except LopdError as error:
            where = f"{source}: stages: {name.removesuffix(BEFORE)}"
            raise type(error)(f"{where}: {error}") from error


def _respelled(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """The recipe with underscores in the names of settings and dashes in those of stages."""
    recipe = underscored(recipe, source)
    if isinstance(stages := recipe.get("stages"), dict):
        stages = underscored(stages, f"{source}: stages")
        recipe["stages"] = {
            name.replace("_", "-"): underscored(settings, f"{source}: stages: {name}")
            if isinstance(settings, dict)
            else settings
            for name, settings in stages.items()
        }
    return recipe


def _check_recipe(recipe: dict[str, Any], source: str) -> None:
    known = ["out", "teacher", "teacher_field", "student", *SHARED, "stages"]
    check_keys(recipe, known, source)
    for key in ("out", "teacher", "student", "stages"):
        if key not in recipe:
            raise ConfigError(f"{source}: '{key}' is missing; lopd run --help shows a recipe")
    for key in ("out", "teacher", "student"):
        if key == "teacher" and isinstance(recipe[key], dict):
            continue  # the stages check names and paths
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
        if settings and typed((bool,), settings.get("plan")):
            raise ConfigError(
                f"{where}: 'plan' writes nothing for later stages to read; run "
                "'lopd score --plan' instead"
            )


def implied_settings(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The output folder and the inputs of a stage that follow from the rest of the recipe."""

    def out(stage: str) -> str:
        return str((recipe["stages"].get(stage) or {}).get("out", Path(recipe["out"]) / stage))

    student = out("sft") if "sft" in recipe["stages"] else recipe["student"]
    teachers = {name: recipe.get(name) for name in ("teacher", "teacher_field")}
    alone = recipe["teacher"] if isinstance(recipe["teacher"], str) else None
    has_prompts = (recipe["stages"].get("eval") or {}).get("prompts") is not None
    scoring = recipe["stages"].get("score") or {}
    lists_student = typed((int,), scoring.get("extra_ids")) or (
        scoring.get("support", "teacher") != "teacher"
    )
    return {"out": out(name)} | {
        "sft-data": teachers,
        "sft": {"model": recipe["student"], "data": out("sft-data")},
        "rollout": {"student": student},
        "score": {
            **teachers,
            "rollouts": out("rollout"),
            "student": student if lists_student else None,
        },
        "distill": {"student": student, "cache": out("score")},
        "eval": {
            "model": out("distill") if "distill" in recipe["stages"] else student,
            "teacher": alone if has_prompts else None,
        },
    }[name]


def is_finished(config: Any) -> bool:
    """Whether a training or evaluation stage is finished; False for stores of sequences.

    The stages of stores find their missing shards themselves.

    Raises:
        ConfigError: the output is complete, and its settings or inputs have changed.
    """
    module = _module(config)
    stage = {sft: "sft", distill: "distill", evaluate: "eval"}.get(module)
    if stage is None:
        return False
    model = config.student if module is distill else config.model
    return finished.is_finished(config, stage, model, module.describe_inputs)
