"""The files under recipes/: parsed strictly, and run on tiny models of their architecture."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import TEXT, train_bpe

from benchmarks.qwen3 import MODELS
from lopd.cli import main
from lopd.config.strict_yaml import load_yaml
from lopd.stages import run

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# What makes a run tiny; all other settings of a recipe stay.
SMALL = {
    "batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2, "warmup_steps": 0,
    "max_tokens_per_batch": 64, "tokens_per_batch": 256, "max_new_tokens": 6, "num_samples": 2,
    "holdout": 2, "eval_steps": 1, "k": 8, "engine": "transformers",
    "fsdp": False, "lora_rank": 2,
}  # fmt: skip
CHAT = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}<|assistant|>"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch):
    monkeypatch.setattr(run, "local_models", lambda name: name)


def test_every_recipe_is_listed():
    listed = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert NAMES and all(f"`recipes/{name}.yaml`" in listed for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_parse(name):
    path = str(RECIPES / f"{name}.yaml")
    configs = run.stage_configs(load_yaml(path), path)
    assert {"rollout", "score", "distill"} <= configs.keys()
    distill = configs["distill"]
    if not distill.fsdp and not distill.lora_rank:
        assert distill.batch_size * distill.gradient_accumulation_steps == 256


@pytest.mark.parametrize(
    ("name", "batch", "teacher", "student"),
    [
        ("paper-8b", 128, "Qwen/Qwen3-32B", "Qwen/Qwen3-8B-Base"),
        ("paper-4b", 256, "Qwen/Qwen3-8B", "Qwen/Qwen3-4B-Base"),
    ],
)
def test_the_papers_recipes_have_the_papers_settings(name, batch, teacher, student):
    path = str(RECIPES / f"{name}.yaml")
    configs = run.stage_configs(load_yaml(path), path)
    sft, rollout, distill = configs["sft"], configs["rollout"], configs["distill"]
    assert (configs["score"].teacher, sft.model) == (teacher, student)
    assert (sft.max_steps, sft.learning_rate, sft.warmup_steps) == (3000, 8e-5, 300)
    assert sft.batch_size * sft.gradient_accumulation_steps == batch
    assert (rollout.max_new_tokens, rollout.temperature, rollout.top_p) == (4096, 0.8, 1.0)
    assert (distill.max_steps, distill.learning_rate, distill.weight_decay) == (150, 2e-6, 0.1)
    assert (distill.adam_beta1, distill.adam_beta2) == (0.9, 0.98)
    assert (distill.objective, distill.advantage_clip) == ("policy_gradient", 10.0)


# Architectures of the models that the recipes name, by a part of the name.
FAMILIES = {
    "-A3B": ("Qwen3Moe", {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-": ("Qwen3", {"tie_word_embeddings": False}),
    "SmolLM2-": ("Llama", {"tie_word_embeddings": True}),
}


def save_like(name, folder, seed):
    """A tiny random model of the architecture of a published one."""
    family, more = next(FAMILIES[part] for part in FAMILIES if part in name)
    if "4B" in name:
        more = {**more, "tie_word_embeddings": True}
    tokenizer = train_bpe(CHAT)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vocabulary = {"vocab_size": len(tokenizer) + 3, "max_position_embeddings": 64}
    config = getattr(transformers, f"{family}Config")(**sizes, **heads, **ids, **vocabulary, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny(recipe, root, teacher, student):
    """The recipe with tiny models, few steps and short answers."""
    words = TEXT.split()
    records = [
        {"prompt": " ".join(words[i : i + 3]), "completion": words[i], "answer": "1"}
        for i in range(10)
    ]
    prompts = root / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    stages = {}
    for name, settings in recipe["stages"].items():
        known = {key: SMALL[key] for key in SMALL if key in (settings or {})}
        stages[name] = (settings or {}) | known
        if (settings or {}).get("engine") == "vllm":
            stages[name].pop("engine_options", None)
        if "prompts" in stages[name]:
            short = {"prompts": str(prompts), "max_new_tokens": SMALL["max_new_tokens"]}
            stages[name] |= short
    models = {"teacher": str(teacher), "student": str(student)}
    return recipe | {"out": str(root / "run"), "stages": stages} | models


@pytest.mark.thorough
@pytest.mark.parametrize("name", NAMES)
def test_recipes_run_on_tiny_models(name, tmp_path):
    recipe = load_yaml(str(RECIPES / f"{name}.yaml"))
    teacher = save_like(recipe["teacher"], tmp_path / "teacher", seed=1)
    student = recipe["student"]
    if student.startswith("runs/"):  # the result of another recipe
        student = load_yaml(str(RECIPES / f"{Path(student).parts[1]}.yaml"))["student"]
    student = save_like(student, tmp_path / "student", seed=2)
    if "sft" not in recipe["stages"]:
        assert main(["declare", "--model", str(student), "--teacher", str(teacher)]) == 0
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny(recipe, tmp_path, teacher, student)))
    assert main(["run", str(path)]) == 0
    manifest = json.loads((tmp_path / "run/distill/manifest.json").read_text())
    assert manifest["overrides"] == []


@pytest.mark.thorough
def test_the_plan_in_the_recipe_for_24_gib_fits(tmp_path, capsys):
    """The command in its comment, as it stands there."""
    text = (RECIPES / "lora-24gib.yaml").read_text(encoding="utf-8")
    (command,) = re.findall(r"^# +(lopd plan [^\\\n]*(?:\\\n[^\\\n]*)*)$", text, re.MULTILINE)
    words = re.sub(r"\\\n#", "", command).split()
    MODELS["8B"].config().save_pretrained(tmp_path)
    words[words.index("Qwen/Qwen3-8B")] = str(tmp_path)
    assert main(words[1:]) == 0 and "--lora-rank" in words
    assert "\nfits, " in capsys.readouterr().out
