"""The loss inside a TRL trainer: `SFTTrainer`, with `compute_loss` replaced.

TRL prepares the data, batches, accumulates, logs and saves. Tokens labelled -100 have no loss.
The teacher stays loaded and scores each batch. Batches are padded, not packed.
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from lopd.models.head import check_head, check_trainable, run_with_loss, run_with_loss_and_router
from lopd.models.load import load_model, load_tokenizer
from lopd.stages.demo import arithmetic as toy
from lopd_kernels import linear_sparse_divergence, linear_topk


class DistillationTrainer(SFTTrainer):
    """Minimises KL(student || teacher) over the teacher's top k tokens and one tail bucket."""

    def __init__(self, *args, teacher: PreTrainedModel, k: int = 8, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher, self.k = teacher.eval().to(self.args.device), k
        check_trainable(self.model)
        for each in (self.model, self.teacher):
            check_head(each)  # refuses a head that transforms logits in an unsupported way

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError("no logits are made; set prediction_loss_only=True")
        predicted = inputs["labels"][:, 1:] != -100  # [B, T - 1]: position t predicts token t + 1
        if not predicted.any():
            raise ValueError("no token has a label; expected some in each batch")
        sequences = {key: inputs[key] for key in ("input_ids", "attention_mask")}

        def score(hidden, weight, bias, head):
            rows = hidden[:, :-1][predicted]
            return linear_topk(rows, weight, self.k, bias=bias, **head.kwargs())

        def divergence(hidden, weight, bias, head):
            return linear_sparse_divergence(
                hidden[:, :-1][predicted], weight, top.ids, top.logprobs,
                tail_logprobs=top.tail_logprobs, reduction="sum", bias=bias, **head.kwargs(),
            )  # fmt: skip

        with self.accelerator.autocast():  # run_with_loss replaces the wrapped forward
            with torch.no_grad():
                top = run_with_loss(self.teacher, sequences, score)
            total, router = run_with_loss_and_router(model, sequences, divergence)
        if router is not None:  # router loss of a mixture of experts, a mean over this batch
            total = total + router * predicted.sum()
        if num_items_in_batch is None:  # evaluation
            return total / predicted.sum()
        # num_items_in_batch counts the tokens of all micro-batches and processes. Gradients are
        # averaged over processes, and the Trainer does not divide any further.
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return scale * total / num_items_in_batch


def tiny_run(folder, rows=None, **settings):
    """A trainer on a tiny student's own answers; for your models, pass folders to `load_model`."""
    paths = [
        toy.write_model(folder / "student", toy.STUDENT_SIZE, seed=0),
        toy.write_model(folder / "teacher", toy.TEACHER_SIZE, seed=1),
    ]
    student, teacher = (load_model(path, dtype="float32", device="cpu") for path in paths)
    tokenizer = load_tokenizer(paths[0])
    # TRL's default, max_length=1024, would cut longer answers and drop longer prompts silently.
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}
    return DistillationTrainer(
        student,
        SFTConfig(str(folder / "out"), **(common | {"disable_tqdm": True} | settings)),
        train_dataset=Dataset.from_list(rows or sample_rows(student, tokenizer)),
        processing_class=tokenizer,
        teacher=teacher,
    )


def sample_rows(student, tokenizer):
    """Token ids of prompts and sampled answers; only the answers have labels."""
    torch.manual_seed(0)
    sampling, rows = {"do_sample": True, "top_k": 0, "max_new_tokens": 12}, []
    for prompt in toy.sample_prompts(32, seed=0, exclude=set()):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        mask = torch.ones_like(ids)
        answer = student.generate(ids, attention_mask=mask, **sampling)[0].tolist()
        labels = [-100] * ids.shape[1] + answer[ids.shape[1] :]
        rows.append({"input_ids": answer, "labels": labels})
    return rows


def main():
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_run(
            Path(folder),
            max_steps=30,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=3e-3,
            logging_steps=5,
            save_strategy="no",
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()
