"""Settings of `lopd run`, and a recipe with every key that is not a setting of a stage."""

from dataclasses import dataclass

from lopd.config.fields import Settings, setting

RECIPE = """\
out: runs/mine              # each stage writes to a folder of its name here
teacher: models/teacher     # folder or hub id; answers the prompts and scores
# or teacher: {math: models/m, code: models/c} with teacher_field: domain
student: models/base        # the base model; without sft, a fine-tuned one
# Optional, for all stages that have the setting: device, seed,
# trust_remote_code, chat_template_kwargs, special_tokens, prompt_date, and
# dtype, which holds for sampling, scoring and evaluation, not for training.
device: cuda
dtype: bfloat16
stages:                     # leave out those that you do not need
  sft-data:                 # settings: those of `lopd sft-data --help`
    prompts: sft.jsonl
    max_new_tokens: 2048
  sft:                      # reads sft-data; or name a file: data: sft.jsonl
    learning_rate: 8.0e-5
  rollout: {prompts: opd.jsonl, num_samples: 4}
  score: {k: 64}            # extra_ids: 16 adds the student's own top tokens
  distill: {holdout: 0.02}  # a stage may read or write elsewhere: out, cache
  eval: {prompts: test.jsonl}   # before and after distill
"""


@dataclass(kw_only=True)
class RunConfig(Settings):
    """Run the stages of a recipe that are not finished, in order (`lopd run recipe.yaml`)."""

    recipe: str = setting(
        help="YAML file with the stages and their settings, as in the recipe of this help."
    )
