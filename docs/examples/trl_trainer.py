"""Distillation in TRL from stored scores: the student answers once, the teacher scores once.

`OfflineDistillationTrainer` is a subclass of TRL's `SFTTrainer`: adapters, schedules, callbacks,
checkpoints and the hub are TRL's. No teacher is loaded while it trains, and no logits are made.
"""

import json
import tempfile
from pathlib import Path

import lopd
from lopd.integrations.trl import OfflineDistillationConfig, OfflineDistillationTrainer
from lopd.stages.demo import arithmetic as toy


def make_cache(folder):
    """Answers of a tiny student, scored by a tiny teacher; for your models, only paths differ."""
    student = toy.write_model(folder / "student", toy.STUDENT_SIZE, seed=0)
    teacher = toy.write_model(folder / "teacher", toy.TEACHER_SIZE, seed=1)
    # Yours was fine-tuned on the teacher's answers, elsewhere or with `lopd sft`.
    lopd.declare(lopd.DeclareConfig(model=str(student), teacher=str(teacher)))
    questions = toy.sample_prompts(32, seed=0, exclude=set())
    lines = [json.dumps({"prompt": question}) + "\n" for question in questions]
    (folder / "prompts.jsonl").write_text("".join(lines))
    rollouts, cache = str(folder / "rollouts"), str(folder / "cache")
    lopd.rollout(
        lopd.RolloutConfig(
            student=str(student),
            prompts=str(folder / "prompts.jsonl"),
            out=rollouts,
            max_new_tokens=12,
        )
    )
    lopd.score(lopd.ScoreConfig(teacher=str(teacher), rollouts=rollouts, out=cache, k=8))
    return student, lopd.TeacherCache.open(cache)


def main():
    with tempfile.TemporaryDirectory() as folder:
        student, cache = make_cache(Path(folder))
        trainer = OfflineDistillationTrainer(
            str(student),
            OfflineDistillationConfig(
                f"{folder}/out",
                objective="reverse_kl",
                learning_rate=3e-3,
                max_steps=30,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
            ),
            cache,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
