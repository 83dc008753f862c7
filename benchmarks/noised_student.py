"""A student for measurements: a model with noise in its weights, its rollouts, and their scores.

    python -m benchmarks.noised_student MODEL --prompts FILE --out DIR [--noise X] [--limit N]

Every matrix of the layers gets normal noise of X times its own standard deviation. So a model of
which nobody has trained a student can be the teacher in `benchmarks.offlist`, for which DIR then
has a `student` and a `cache` with lists of 128 ids.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from lopd.config.rollout import RolloutConfig
from lopd.config.score import ScoreConfig
from lopd.models.load import load_model, load_tokenizer
from lopd.stages import rollout, score

LONGEST_LIST = 128


@torch.no_grad()
def add_noise(model: Any, size: float) -> Any:
    """Add normal noise, in proportion to their spread, to the matrices of the layers."""
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    for weight in model.parameters():
        if weight.dim() == 2 and weight is not embedding and weight is not head:
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of the teacher")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.06, help="relative to each matrix")
    parser.add_argument("--limit", type=int, default=64, help="number of prompts")
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args(arguments)
    student = args.out / "student"
    if not student.exists():
        model = load_model(args.model, dtype="float32", device="cpu")
        add_noise(model, args.noise).save_pretrained(student)
        load_tokenizer(args.model).save_pretrained(student)
    rollouts, common = str(args.out / "rollouts"), {"dtype": "float32", "device": "cpu"}
    rollout.main(
        RolloutConfig(
            student=str(student),
            prompts=args.prompts,
            limit=args.limit,
            out=rollouts,
            max_new_tokens=args.new_tokens,
            **common,
        )
    )
    cache = str(args.out / "cache")
    score.main(
        ScoreConfig(
            teacher=args.model, rollouts=rollouts, out=cache, k=LONGEST_LIST, top_p=1.0, **common
        )
    )


if __name__ == "__main__":
    main()
