"""The commands of `lopd`: what each reads and writes, with examples for its help."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from lopd.config.run import RECIPE

PIPELINE = "The pipeline, in order"
WHOLE = "The whole pipeline in one command"
OTHER = "Around it"
# What a signal leaves of a command.
NOTHING = "nothing was written; rerun the same command to start over"
SHARDS = "finished shards are kept; rerun the same command to continue"
CHECKPOINT = "the last checkpoint, if one was saved, is kept; rerun the same command to continue"
STAGES = "finished stages, shards and checkpoints are kept; rerun the same command to continue"


@dataclass(frozen=True)
class Command:
    """One command. Its settings are in `lopd.config`, its code in the module of `lopd.stages`."""

    module: str  # of lopd.config and of lopd.stages
    config_name: str
    section: str
    summary: str
    flow: str  # what it reads -> what it writes
    examples: tuple[str, ...]  # what follows the command's name
    positional: str | None = None  # the setting that may be given without its flag
    many: bool = False  # it may be given several times, and is then joined by commas
    recipe: str = ""  # a file that it reads, which its help shows
    kept: str = NOTHING  # printed when a signal stops it

    def config_class(self) -> Any:
        """The dataclass of the command's settings; imports neither torch nor transformers."""
        return getattr(import_module(f"lopd.config.{self.module}"), self.config_name)


COMMANDS = {
    "sft-data": Command(
        "sft_data",
        "SftDataConfig",
        PIPELINE,
        "Sample the teacher's answers to prompts.",
        "teacher/ + prompts -> answers/",
        ("--teacher teacher/ --prompts sft.jsonl --out answers/ --max-new-tokens 2048",),
        kept=SHARDS,
    ),
    "sft": Command(
        "sft",
        "SftConfig",
        PIPELINE,
        "Fine-tune the student on those answers.",
        "base/ + answers/ -> student/",
        (
            "--model base/ --data answers/ --out student/ --num-epochs 2",
            "--model base/ --data answers/ --out student/ --lora-rank 32",
        ),
        kept=CHECKPOINT,
    ),
    "rollout": Command(
        "rollout",
        "RolloutConfig",
        PIPELINE,
        "Sample the fine-tuned student, once.",
        "student/ + prompts -> rollouts/",
        (
            "--student student/ --prompts opd.jsonl --out rollouts/ --num-samples 4",
            "--student student/ --prompts opd.jsonl --out rollouts/ --engine vllm --worker 0/2",
        ),
        kept=SHARDS,
    ),
    "score": Command(
        "score",
        "ScoreConfig",
        PIPELINE,
        "Score the rollouts with the teacher, once.",
        "teacher/ + rollouts/ -> cache/",
        (
            "--teacher teacher/ --rollouts rollouts/ --out cache/ --plan",
            "--teacher teacher/ --rollouts rollouts/ --out cache/ --k 128 --codec compact",
        ),
        kept=SHARDS,
    ),
    "distill": Command(
        "distill",
        "DistillConfig",
        PIPELINE,
        "Train the student on the cache, without the teacher.",
        "student/ + cache/ -> result/",
        (
            "--student student/ --cache cache/ --out result/ --max-steps 500",
            "--student student/ --cache cache/ --out result/ --holdout 0.05 --keep-best",
            "--config distill.yaml --learning-rate 1e-6",
        ),
        kept=CHECKPOINT,
    ),
    "eval": Command(
        "evaluate",
        "EvalConfig",
        PIPELINE,
        "Measure accuracy on prompts, and the KL to a teacher.",
        "result/ + prompts (+ teacher/), or cache/, or both -> eval/",
        (
            "--model result/ --prompts test.jsonl --out eval/ --teacher teacher/",
            "--model result/ --prompts test.jsonl --out eval/ --judge math",
            "--model result/ --cache held-out/ --out eval/",
        ),
    ),
    "run": Command(
        "run",
        "RunConfig",
        WHOLE,
        "Run the unfinished stages of a recipe, in order.",
        "recipe.yaml -> a folder for each stage",
        ("recipe.yaml",),
        positional="recipe",
        recipe=RECIPE,
        kept=STAGES,
    ),
    "demo": Command(
        "demo",
        "DemoConfig",
        WHOLE,
        "Run the whole pipeline on a CPU, with toy models or a small chat model.",
        "nothing -> models, data and results",
        ("--out runs/demo", "--out runs/demo --online", "--task smollm2 --out runs/demo-real"),
        kept=STAGES,
    ),
    "import": Command(
        "import_scores",
        "ImportConfig",
        OTHER,
        "Make a cache or rollouts from what another tool wrote.",
        "scores or rollouts in parquet or JSONL -> cache/ or rollouts/",
        (
            "--source scores.jsonl --format topk --teacher teacher/ --student student/ "
            "--out cache/",
            "--source dump.jsonl --format rollouts --student student/ --out rollouts/",
        ),
        kept=SHARDS,
    ),
    "calibrate": Command(
        "calibrate",
        "CalibrateConfig",
        OTHER,
        "Take the mean difference of another teacher out of a cache.",
        "cache/ -> calibrated/, for --objective policy_gradient or log_ratio",
        ("--cache cache/ --out calibrated/",),
    ),
    "declare": Command(
        "declare",
        "DeclareConfig",
        OTHER,
        "Admit a checkpoint that was fine-tuned elsewhere.",
        "student/ -> a statement in student/",
        ("--model student/ --teacher teacher/",),
    ),
    "plan": Command(
        "plan",
        "PlanConfig",
        OTHER,
        "Estimate peak training memory, and how to make it fit.",
        "the model's config.json -> a table",
        (
            "--model student/ --gpu-memory 80GB --sequence-length 8192",
            "--model student/ --gpu-memory 24GiB --lora-rank 32 --gradient-checkpointing",
        ),
    ),
    "inspect": Command(
        "inspect",
        "InspectConfig",
        OTHER,
        "Show what a folder holds.",
        "any folder above -> a table",
        ("cache/", "cache/ --verify"),
        positional="path",
    ),
    "verify": Command(
        "verify",
        "VerifyConfig",
        OTHER,
        "Check a folder, and a cache's noise with --rescore.",
        "any folder above -> a table",
        ("cache/", "cache/ --rescore 64 --teacher teacher/ --student student/"),
        positional="path",
    ),
    "report": Command(
        "report",
        "ReportConfig",
        OTHER,
        "Write a page about one or several runs.",
        "result/ (+ eval/) -> result/report.html",
        ("result/", "result/ other/ --evals eval/ --out report.html"),
        positional="runs",
        many=True,
    ),
    "doctor": Command(
        "doctor",
        "DoctorConfig",
        OTHER,
        "Show what this machine has and lacks.",
        "nothing -> a table",
        ("", "--json"),
    ),
}
