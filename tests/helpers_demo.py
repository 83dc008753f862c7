"""Demos of a few prompts and steps: the same stages, with tiny random models."""

from dataclasses import replace

import torch
from conftest import TEMPLATE, train_bpe

from lopd.stages.demo import arithmetic, toy
from lopd.stages.demo.real import TASK, RealDemo

TINY = replace(
    TASK,
    sets={"eval": 4, "sft": 6, "opd": 4},
    steps=2,
    common={**TASK.common, "batch_size": 2, "warmup_steps": 1, "log_every": 1},
    sft={**TASK.sft, "max_steps": 2},
    opd={**TASK.opd, "max_steps": 2},
    sampling={**TASK.sampling, "max_new_tokens": 4},
    scoring={**TASK.scoring, "k": 8},
    evaluation={**TASK.evaluation, "kl_k": 8},
)


class TinyRealDemo(RealDemo):
    """The same stages with a random teacher of three layers, in the place of SmolLM2."""

    task = TINY
    dropped = (1,)

    def load_teacher(self):
        return tiny_llama(), train_bpe(TEMPLATE)


def tiny_llama():
    """A random model of SmolLM2's architecture, with three layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_bpe()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return LlamaForCausalLM(config).eval()


def shrink_toy_demo(patch):
    """Give the toy demo few prompts, small models and two steps, until `patch` is undone."""
    for settings, few in (
        (toy.PROMPTS, {"eval": 6, "demonstrations": 64, "sft": 8, "opd": 8}),
        (toy.SFT_STEPS, {"teacher": 2, "student": 2}),
        (toy.SFT_SETTINGS, {"batch_size": 4, "warmup_steps": 1}),
        (toy.OPD_SETTINGS, {"batch_size": 4, "warmup_steps": 1, "max_steps": 2}),
        (toy.TASK.sampling, {"max_new_tokens": 8}),
        (arithmetic.TEACHER_SIZE, {"hidden_size": 32, "intermediate_size": 32}),
        (arithmetic.STUDENT_SIZE, {"hidden_size": 32, "intermediate_size": 16}),
    ):
        assert few.keys() <= settings.keys()
        for name, value in few.items():
            patch.setitem(settings, name, value)
