"""The demo's task, chain arithmetic modulo 10, and its two tiny models.

A prompt like `3+5*2-7*4=` is evaluated from left to right. The answer lists the steps,
`3+5=8;8*2=6;6-7=9;9*4=6;#6`; it is correct if the digit after the last `#` is. All 8.1 million
prompts have the same length, and a model of 50k parameters learns the task in seconds.
"""

import json
import random
from pathlib import Path
from typing import Any

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
CHAIN = 4
CONTEXT = 64
MAX_NEW_TOKENS = 32
PAD, EOS = "<pad>", "<eos>"
SYMBOLS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", *OPERATORS, "=", ";", "#"]
# Never used in the data: real vocabularies have unused rows too.
SPARES = [f"<spare{i}>" for i in range(10)]

TEACHER_SIZE = {"hidden_size": 64, "intermediate_size": 128}
STUDENT_SIZE = {"hidden_size": 48, "intermediate_size": 96}


def sample_prompts(count: int, seed: int, *, exclude: set[str]) -> list[str]:
    """Draw `count` distinct prompts that are not in `exclude`, and add them to it."""
    source = random.Random(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        digits = [str(source.randrange(10)) for _ in range(CHAIN + 1)]
        operators = [source.choice(list(OPERATORS)) for _ in range(CHAIN)]
        pairs = zip(operators, digits[1:], strict=True)
        prompt = digits[0] + "".join(op + digit for op, digit in pairs) + "="
        if prompt not in exclude:
            exclude.add(prompt)
            prompts.append(prompt)
    return prompts


def solve(prompt: str) -> tuple[str, str]:
    """The answer to a prompt, with its steps, and the final digit."""
    value, steps = int(prompt[0]), []
    for i in range(1, len(prompt) - 1, 2):
        operator, digit = prompt[i], int(prompt[i + 1])
        result = OPERATORS[operator](value, digit) % 10
        steps.append(f"{value}{operator}{digit}={result};")
        value = result
    return "".join(steps) + f"#{value}", str(value)


def write_prompts(path: Path, prompts: list[str], *, completions: bool = False) -> Path:
    """Write JSONL of prompts with final digits or, with `completions`, with whole answers."""
    with path.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            solution, answer = solve(prompt)
            shown = {"completion": solution} if completions else {"answer": answer}
            file.write(json.dumps({"prompt": prompt, **shown}) + "\n")
    return path


def build_tokenizer() -> Any:
    """A tokenizer with one token for each character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([PAD, EOS, *SYMBOLS, *SPARES])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def write_model(folder: Path, size: dict[str, int], seed: int) -> Path:
    """Save a randomly initialised Qwen3 with its tokenizer; `size` is part of its config."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{"tie_word_embeddings": True, **size},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    unfinished = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    return unfinished.rename(folder)
