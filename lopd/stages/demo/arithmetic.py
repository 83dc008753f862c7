"""The demo's world: chain arithmetic modulo 10, solved in steps, and two tiny models.

A prompt is `3+5*2-7*4=`, evaluated from left to right; the answer writes every step,
`3+5=8;8*2=6;6-7=9;9*4=6;#6`, and is right when what follows the last `#` is. All prompts
have one length, 8.1 million of them exist, and a model of 50k parameters learns the task
in seconds.
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
# The spare symbols are never used: a vocabulary has rows that data does not touch.
SYMBOLS = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9", *OPERATORS, "=", ";", "#"]
SPARES = [f"<spare{i}>" for i in range(10)]

TEACHER_SIZE = {"hidden_size": 64, "intermediate_size": 128}
STUDENT_SIZE = {"hidden_size": 48, "intermediate_size": 96}


def sample_prompts(count: int, seed: int, *, exclude: set[str]) -> list[str]:
    """Draw `count` distinct prompts outside `exclude`, and add them to it."""
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
    """The worked solution and the final digit of a prompt."""
    value, steps = int(prompt[0]), []
    for i in range(1, len(prompt) - 1, 2):
        operator, digit = prompt[i], int(prompt[i + 1])
        result = OPERATORS[operator](value, digit) % 10
        steps.append(f"{value}{operator}{digit}={result};")
        value = result
    return "".join(steps) + f"#{value}", str(value)


def write_prompts(path: Path, prompts: list[str], *, completions: bool = False) -> Path:
    """Write a JSONL of prompts with answers, or of worked demonstrations."""
    with path.open("w", encoding="utf-8") as file:
        for prompt in prompts:
            solution, answer = solve(prompt)
            shown = {"completion": solution} if completions else {"answer": answer}
            file.write(json.dumps({"prompt": prompt, **shown}) + "\n")
    return path


def build_tokenizer() -> Any:
    """A tokenizer of one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([PAD, EOS, *SYMBOLS, *SPARES])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def write_model(folder: Path, size: dict[str, int], seed: int) -> Path:
    """Save a freshly initialised Qwen3 of the given size, with its tokenizer."""
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
