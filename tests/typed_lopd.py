"""Every public name of lopd in typed code, which must pass `mypy --strict`."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from lopd import (
    CalibrateConfig,
    DeclareConfig,
    DemoConfig,
    DistillConfig,
    DoctorConfig,
    EvalConfig,
    ImportConfig,
    InspectConfig,
    LopdTrainer,
    Objective,
    PlanConfig,
    ReportConfig,
    RolloutConfig,
    RolloutStore,
    RunConfig,
    ScoreConfig,
    SftConfig,
    SftDataConfig,
    TeacherCache,
    VerifyConfig,
    calibrate,
    declare,
    demo,
    distill,
    doctor,
    errors,
    evaluate,
    import_scores,
    inspect,
    plan,
    report,
    rollout,
    run,
    run_with_loss,
    score,
    sft,
    sft_data,
    step,
    train_loop,
    verify,
)


def pipeline() -> list[Path | None]:
    return [
        sft_data(SftDataConfig(teacher="t", prompts="p.jsonl", out="answers")),
        sft(SftConfig(model="m", data="answers", out="student", num_epochs=2.0)),
        rollout(RolloutConfig(student="student", prompts="p.jsonl", out="rollouts")),
        score(ScoreConfig(teacher="t", rollouts="rollouts", out="cache", plan=True)),
        distill(DistillConfig(student="student", cache="cache", out="result", tail="bucket")),
        evaluate(EvalConfig(model="result", prompts="p.jsonl", out="eval")),
        run(RunConfig(recipe="recipe.yaml")),
        demo(DemoConfig(seed=1)),
    ]


def around(path: Path) -> Path:
    plan(PlanConfig(model="m", gpu_memory="24GiB"))
    inspect(InspectConfig(path=str(path)))
    doctor(DoctorConfig())
    print(report(ReportConfig(runs=str(path))))
    verify(VerifyConfig(path=str(path)))
    import_scores(
        ImportConfig(source="s.jsonl", format="topk", teacher="t", student="s", out="cache")
    )
    calibrate(CalibrateConfig(cache="cache", out="calibrated"))
    return declare(DeclareConfig(model="m", teacher="t"))


def caches(folder: str) -> tuple[int, int]:
    with_scores, rollouts = TeacherCache.open(folder), RolloutStore.open(folder)
    return len(with_scores), len(rollouts[0].tokens)


def losses(model: Any, batch: dict[str, Tensor], loss: Callable[..., Tensor]) -> Tensor:
    objective = Objective("jsd", beta=0.3)
    value, _ = step(model, batch, objective, 1.0)
    return value + run_with_loss(model, batch, loss)


def training(model: Any, batches: Iterable[Any], trainer: LopdTrainer) -> type[Exception]:
    trainer.train()
    train_loop(model, batches, Objective("reverse_kl"), SftConfig(model="m", data="d", out="o"))
    return errors.LopdError
