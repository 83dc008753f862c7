"""Recipes: implied settings, skipped stages, refused changes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from lopd.cli import main
from lopd.errors import ConfigError, MissingFileError
from lopd.stages import run as recipe

STAGES = {
    "sft-data": {"prompts": "a.jsonl"},
    "sft": None,
    "rollout": {"prompts": "b.jsonl"},
    "score": {"k": 5},
    "distill": {"max_steps": 3},
    "eval": {"prompts": "c.jsonl"},
}
BASE = {"out": "runs/x", "teacher": "T", "student": "S", "dtype": "float16", "stages": STAGES}


def test_stages_read_what_earlier_stages_wrote():
    configs = recipe.stage_configs(BASE, "r.yaml")
    expected = ["sft-data", "sft", "rollout", "score", "distill", "eval-student", "eval"]
    assert list(configs) == expected
    before = configs["eval-student"]
    assert (before.model, before.out) == ("runs/x/sft", "runs/x/eval-student")
    assert dataclasses.replace(before, model="runs/x/distill", out="runs/x/eval") == configs["eval"]
    alone = {**STAGES, "eval": {"prompts": "c.jsonl", "model": "M"}}
    assert "eval-student" not in recipe.stage_configs(BASE | {"stages": alone}, "r.yaml")
    assert configs["sft-data"].teacher == configs["score"].teacher == configs["eval"].teacher == "T"
    assert (configs["sft"].model, configs["sft"].data) == ("S", "runs/x/sft-data")
    assert configs["rollout"].student == configs["distill"].student == "runs/x/sft"
    assert configs["score"].rollouts == "runs/x/rollout"
    assert configs["distill"].cache == "runs/x/score"
    assert configs["eval"].model == "runs/x/distill"
    assert {name: config.dtype for name, config in configs.items()} == {
        "sft-data": "float16",
        "sft": "float32",
        "rollout": "float16",
        "score": "float16",
        "distill": "float32",
        "eval-student": "float16",
        "eval": "float16",
    }
    assert configs["score"].k == 5 and configs["distill"].max_steps == 3


def test_several_teachers_are_those_of_the_stages_that_route():
    teachers = {"teacher": {"math": "M", "code": "C"}, "teacher_field": "domain"}
    configs = recipe.stage_configs(BASE | teachers, "r.yaml")
    for name in ("sft-data", "score"):
        assert configs[name].teachers == {"math": "M", "code": "C"}
        assert configs[name].teacher_field == "domain"
    assert configs["eval"].teacher is None


def test_settings_of_prompts_are_shared_by_the_stages_that_read_prompts():
    shared = {"chat_template_kwargs": {"enable_thinking": "false"}, "prompt_date": "2031-01-02"}
    configs = recipe.stage_configs(BASE | shared, "r.yaml")
    for name in ("sft-data", "rollout", "eval"):
        assert configs[name].template_kwargs() == {"enable_thinking": False}
        assert configs[name].prompt_date == "2031-01-02"
    assert configs["sft"].prompt_date is None  # its data are tokens
    stages = STAGES | {"sft": {"data": "own.jsonl"}}
    configs = recipe.stage_configs(BASE | shared | {"stages": stages}, "r.yaml")
    assert configs["sft"].prompt_date == "2031-01-02"


def test_without_sft_the_student_rolls_out():
    stages = {name: STAGES[name] for name in ("rollout", "score", "eval")}
    configs = recipe.stage_configs(BASE | {"stages": stages}, "r.yaml")
    assert configs["rollout"].student == configs["eval"].model == "S"


def test_an_evaluation_on_a_cache_alone_needs_no_teacher():
    stages = STAGES | {"eval": {"cache": "held-out"}}
    configs = recipe.stage_configs(BASE | {"stages": stages}, "r.yaml")
    assert configs["eval"].teacher is configs["eval"].prompts is None
    assert configs["eval"].cache == configs["eval-student"].cache == "held-out"


def test_extra_ids_come_from_the_student_that_rolls_out():
    stages = STAGES | {"score": {"extra_ids": 4}}
    assert (
        recipe.stage_configs(BASE | {"stages": stages}, "r.yaml")["score"].student == "runs/x/sft"
    )
    assert recipe.stage_configs(BASE, "r.yaml")["score"].student is None


def test_recipe_runs_in_one_process(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="found worker 1/2; expected one process"):
        recipe.main(recipe.RunConfig(recipe="r.yaml"))


def test_output_folder_of_a_stage_can_be_set():
    stages = STAGES | {"rollout": {"prompts": "b.jsonl", "out": "elsewhere"}}
    assert (
        recipe.stage_configs(BASE | {"stages": stages}, "r.yaml")["score"].rollouts == "elsewhere"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stagse": {}}, "r.yaml: unknown setting 'stagse'; did you mean 'stages'"),
        ({"stages": {}}, "'stages' is {}; expected a mapping"),
        ({"stages": {"rolout": {}}}, "unknown setting 'rolout'; did you mean 'rollout'"),
        ({"stages": {"score": {"top_q": 1}}}, "stages: score: unknown setting 'top_q'"),
        ({"stages": {"score": 3}}, "stages: score: expected a mapping"),
        ({"stages": {"sft-data": {"prompts": "p"}, "rollout": 3}}, "rollout: expected a mapping"),
        ({"stages": ["rollout"]}, "'stages' is .'rollout'.; expected a mapping"),
        ({"stages": {"score": {"out": 3}}}, "score: 'out' is 3; expected a folder"),
        ({"stages": {"score": {"plan": True}}}, "score: 'plan' writes nothing for later stages"),
        ({"out": 5}, "'out' is 5; expected a folder"),
        ({"teacher": None}, "'teacher' is None; expected a folder"),
        ({"stages": {"rollout": {}}}, "'prompts' is missing"),
    ],
)
def test_invalid_recipe_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe.stage_configs(BASE | changes, "r.yaml")


@pytest.mark.parametrize("key", ["out", "teacher", "student", "stages"])
def test_missing_key_is_named(key):
    recipe_without = {name: value for name, value in BASE.items() if name != key}
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        recipe.stage_configs(recipe_without, "r.yaml")


@pytest.fixture(scope="module")
def finished_run(teacher_folder, student_folder, tmp_path_factory):
    """A whole recipe on randomly initialised models, run from the command line."""
    root = tmp_path_factory.mktemp("recipe")
    prompts = root / "prompts.jsonl"
    texts = [f"the {a} {b}" for a in ("cat", "dog", "mat") for b in ("sat", "ran")]
    prompts.write_text("".join(json.dumps({"prompt": t, "answer": "1"}) + "\n" for t in texts))
    sample = {"prompts": str(prompts), "max_new_tokens": 6}
    train = {"max_steps": 2, "batch_size": 2, "save_every": 0, "log_every": 1}
    values = {
        "out": str(root / "run"),
        "teacher": str(teacher_folder),
        "student": str(student_folder),
        "dtype": "float32",
        "device": "cpu",
        "stages": {
            "sft-data": sample | {"shard_size": 4},
            "sft": train,
            "rollout": sample | {"shard_size": 4},
            "score": {"k": 4, "codec": "packed"},
            "distill": train | {"learning_rate": 1e-4},
            "eval": sample | {"num_samples": 2},
        },
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["run", str(path)]) == 0
    return path, values


def test_every_stage_writes_its_artefact(finished_run):
    out = Path(finished_run[1]["out"])
    kinds = {
        folder.name: json.loads((folder / "manifest.json").read_text())["kind"]
        for folder in sorted(out.iterdir())
    }
    assert kinds == {
        "sft-data": "sft_data",
        "sft": "checkpoint",
        "rollout": "rollouts",
        "score": "cache",
        "distill": "checkpoint",
        "eval": "evaluation",
        "eval-student": "evaluation",
    }


def test_second_run_changes_nothing(finished_run, capsys):
    path, values = finished_run
    files = [file for file in Path(values["out"]).rglob("*") if file.is_file()]
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}
    assert main(["run", str(path)]) == 0
    printed = capsys.readouterr()
    assert "running" not in printed.err and printed.err.count(": done, ") == 7
    _, table = printed.out.split("\nresults\n")
    student, result = table.splitlines()
    assert student.startswith(f"eval-student, {values['out']}/sft ") and "greedy 0." in student
    assert result.startswith(f"eval, {values['out']}/distill ") and "KL at least " in result
    after = [file for file in Path(values["out"]).rglob("*") if file.is_file()]
    assert sorted(after) == sorted(before)
    assert all(before[file] == (file.stat().st_mtime_ns, file.read_bytes()) for file in after)


def test_changed_setting_of_a_finished_stage_is_refused(finished_run, tmp_path, capsys):
    values = finished_run[1]
    stages = values["stages"] | {"distill": values["stages"]["distill"] | {"max_steps": 5}}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(values | {"stages": stages}))
    assert main(["run", str(changed)]) == 2
    assert "holds another recipe (max_steps was 2, is 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "changes", "named"),
    [
        ("sft", {"model": "teacher"}, r"another recipe \(model was"),
        ("sft", {"data": "rollout"}, "holds 'rollouts', expected 'sft_data'"),
        ("distill", {"student": "student"}, r"another recipe \(model was"),
        ("eval", {"model": "sft"}, r"another recipe \(model was"),
        ("eval", {"prompts": "prompts"}, r"another recipe \(prompts was"),
        ("eval", {"teacher": "sft"}, r"another recipe \(teacher was"),
        ("eval", {"cache": "score"}, r"another recipe \(cache was None, is"),
    ],
)
def test_changed_input_of_a_finished_stage_is_refused(
    finished_run, tmp_path, stage, changes, named
):
    """The settings agree and the digests do not, as if the contents of a folder had changed."""
    path, values = finished_run
    other = tmp_path / "prompts.jsonl"
    other.write_text('{"prompt": "a", "answer": "1"}\n')
    out = Path(values["out"])
    paths = {"teacher": values["teacher"], "student": values["student"], "prompts": str(other)}
    paths |= {name: str(out / name) for name in ("sft", "rollout", "score")}
    config = recipe.stage_configs(values, str(path))[stage]
    assert recipe.is_finished(config)
    copy = tmp_path / stage
    shutil.copytree(out / stage, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    ((key, name),) = changes.items()
    manifest["config"] |= {"out": str(copy), key: paths[name]}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    changed = dataclasses.replace(config, out=str(copy), **{key: paths[name]})
    with pytest.raises(ConfigError, match=named):
        recipe.is_finished(changed)


@pytest.mark.parametrize("stage", ["sft", "distill", "eval"])
def test_settings_that_do_not_affect_the_artefact_may_change(finished_run, stage):
    path, values = finished_run
    config = recipe.stage_configs(values, str(path))[stage]
    assert recipe.is_finished(dataclasses.replace(config, device="auto"))
    if stage == "eval":
        assert recipe.is_finished(dataclasses.replace(config, batch_size=3))
    else:
        assert recipe.is_finished(dataclasses.replace(config, log_every=7))
        cut = {"batch_size": 1, "gradient_accumulation_steps": config.batch_size}
        assert recipe.is_finished(dataclasses.replace(config, gradient_checkpointing=True, **cut))
        with pytest.raises(ConfigError, match="sequences_per_step was 2, is 3"):
            recipe.is_finished(dataclasses.replace(config, batch_size=3))


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        ("eval", {"prompts": "nowhere.jsonl"}, "eval: nowhere.jsonl: no such file"),
        ("rollout", {"prompts": "teacher"}, "rollout: teacher: no such file"),
        ("distill", {"student": "nowhere"}, "distill: nowhere: no such file"),
        ("distill", {"cache": "nowhere"}, "distill: cache: nowhere: no such file"),
    ],
)
def test_what_no_stage_writes_must_exist_before_the_first_stage_runs(
    finished_run, tmp_path, capsys, stage, changes, words
):
    values = finished_run[1]
    stages = values["stages"] | {stage: (values["stages"][stage] or {}) | changes}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(values | {"stages": stages, "out": str(tmp_path / "out")}))
    assert main(["run", str(changed)]) == 2
    assert f"stages: {words}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spelt", ["{}/", "{}/../sft", "./{}"])
def test_what_a_stage_writes_may_be_spelt_otherwise(finished_run, tmp_path, monkeypatch, spelt):
    path, values = finished_run
    monkeypatch.chdir(tmp_path)
    eval_settings = (values["stages"]["eval"] or {}) | {"model": spelt.format("out/sft")}
    changed = values | {"out": "out", "stages": values["stages"] | {"eval": eval_settings}}
    recipe.check_inputs(recipe.stage_configs(changed, str(path)), str(path))
    eval_settings["model"] += "-of-another"
    with pytest.raises(MissingFileError):
        recipe.check_inputs(recipe.stage_configs(changed, str(path)), str(path))


def test_a_stage_may_name_a_model_by_its_hub_id(finished_run, monkeypatch):
    path, values = finished_run
    asked = []

    def local(name):
        asked.append(name)
        return values["teacher"] if name == "org/name" else name

    monkeypatch.setattr(recipe, "local_models", local)
    score = (values["stages"]["score"] or {}) | {"teacher": "org/name"}
    changed = values | {"stages": values["stages"] | {"score": score}}
    recipe.check_inputs(recipe.stage_configs(changed, str(path)), str(path))
    assert "org/name" in asked


def test_evaluation_without_the_teacher_is_refused(finished_run):
    path, values = finished_run
    config = recipe.stage_configs(values, str(path))["eval"]
    copy = Path(config.out).parent / "eval-alone"
    shutil.copytree(config.out, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["inputs"]["teacher"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    try:
        with pytest.raises(ConfigError, match="teacher was None, is"):
            recipe.is_finished(dataclasses.replace(config, out=str(copy)))
    finally:
        shutil.rmtree(copy)


def test_changed_weights_are_detected(finished_run, tmp_path, capsys):
    copy = tmp_path / "checkpoint"
    shutil.copytree(Path(finished_run[1]["out"]) / "sft", copy)
    assert main(["inspect", "--path", str(copy), "--verify"]) == 0
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["inspect", "--path", str(copy), "--verify"]) == 2
    assert "its weights are not those" in capsys.readouterr().err
    evaluation = tmp_path / "eval"
    shutil.copytree(Path(finished_run[1]["out"]) / "eval", evaluation)
    assert main(["inspect", "--path", str(evaluation), "--verify"]) == 0
    (evaluation / "results.json").write_bytes(b"{}")
    assert main(["inspect", "--path", str(evaluation), "--verify"]) == 2
    assert "results.json" in capsys.readouterr().err


def test_artefacts_can_be_inspected(finished_run, capsys):
    out = Path(finished_run[1]["out"])
    for name in ("sft-data", "rollout", "score"):
        assert main(["inspect", "--path", str(out / name), "--verify"]) == 0
        shown = capsys.readouterr().out
        assert "sequences" in shown and "every shard matches its receipt" in shown
    assert main(["inspect", "--path", str(out / "distill")]) == 0
    assert "fine-tuned on" in capsys.readouterr().out


def test_bit_flip_is_detected(finished_run, tmp_path, capsys):
    copy = tmp_path / "cache"
    shutil.copytree(Path(finished_run[1]["out"]) / "score", copy)
    shard = copy / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", "--path", str(copy), "--verify"]) == 2
    assert "shard-00000" in capsys.readouterr().err
