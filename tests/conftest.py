"""Models, tokenizers and prompts that the tests make for themselves."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lopd.cli import show_messages

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the tensors are tiny, and threads that wait for each other are slow

TEXT = "the cat sat on a mat and the dog ran to the red house while it was raining again"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


ON_EVERY_DEVICE = {"test_divergence", "test_logprobs", "test_numerics", "test_ops", "test_policy"}


def pytest_generate_tests(metafunc):
    """The tests of the losses run on a GPU too, where one is asked for with `-m gpu`."""
    if metafunc.module.__name__ in ON_EVERY_DEVICE:
        marks = (pytest.mark.gpu, pytest.mark.slow)
        devices = ["cpu", pytest.param("cuda", marks=marks)]
        metafunc.parametrize("default_device", devices, indirect=True)


@pytest.fixture(autouse=True)
def default_device(request):
    """Where tensors are made that do not say: tests of the losses say it nowhere."""
    if getattr(request, "param", "cpu") == "cpu":
        yield "cpu"
        return
    with torch.device(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _private_fingerprint_memo(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "memo"))


@pytest.fixture(autouse=True)
def _messages():
    """Stages called from Python log as they do from the command line: on stderr."""
    show_messages()


def train_bpe(chat_template: str | None = None):
    """A byte-level BPE tokenizer, trained here and now."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = chat_template
    return fast


def save_qwen3(
    folder: Path, seed: int, *, chat_template: str | None = None, scale: float = 0.2, **changes
) -> Path:
    """A randomly initialised Qwen3 folder; `scale` large enough for answers that vary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = train_bpe(chat_template)
    settings = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": scale,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("teacher"), seed=1)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("student"), seed=2, num_hidden_layers=2)


@pytest.fixture(scope="module")
def student(student_folder, teacher_folder, tmp_path_factory) -> Path:
    """The student, declared to be fine-tuned on the teacher's answers."""
    from helpers_stages import declared

    return declared(student_folder, teacher_folder, tmp_path_factory.mktemp("declared"))


@pytest.fixture(scope="module")
def dumped(teacher_folder, student):
    """What the teacher says of made-up answers of the student, for dumps to import."""
    from helpers_import import dump_of

    return dump_of(teacher_folder, student)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """Teacher, student, rollouts and cache of random numbers, for tests of training."""
    from helpers_artefacts import write_pipeline

    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def no_model(monkeypatch):
    """Fail the test if a model is loaded."""
    import transformers

    def explode(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def prompt_file(write_jsonl) -> Path:
    return write_jsonl([{"prompt": f"{a} {b}", "answer": b} for a, b in pairwise(TEXT.split()[:8])])
