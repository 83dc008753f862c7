"""A TRL trainer on the artefacts of `helpers_artefacts`."""

from lopd.models.load import load_model, load_tokenizer

QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}


def make_trainer(pipeline, out, data, eval_dataset=None, peft_config=None, folder=True, **settings):
    """A trainer of the pipeline's student; `folder` says whether the model knows its own."""
    from lopd.integrations.trl import OfflineDistillationConfig, OfflineDistillationTrainer

    settings = {"save_strategy": "no", "per_device_train_batch_size": 4, **QUIET, **settings}
    model = load_model(pipeline / "student", dtype="float32", device="cpu")
    if not folder:
        model.name_or_path = ""
    return OfflineDistillationTrainer(
        model,
        OfflineDistillationConfig(str(out), **settings),
        data,
        eval_dataset,
        processing_class=load_tokenizer(pipeline / "student"),
        peft_config=peft_config,
    )
