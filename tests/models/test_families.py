"""Every causal-LM family works exactly in each stage or is refused with a sentence."""

import re
from pathlib import Path

import pytest
import transformers

from benchmarks.families import STAGES, byte_tokenizer, try_family
from benchmarks.tiny_families import families

pytestmark = pytest.mark.thorough

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# A dense model, learned positions, soft caps and windows, two multimodal folders, experts of
# several kinds, latent attention with an indexer, recurrent layers, sinks, and an encoder.
SLICE = (
    *("llama", "gpt2", "opt", "gemma2", "gemma3", "gemma4", "qwen3_moe", "granitemoe"),
    *("llama4_text", "deepseek_v32", "qwen3_next", "falcon_h1", "zamba", "gpt_oss", "bert"),
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def documented(kind):
    """What docs/models.md says of a family, by stage: yes or no."""
    page = PAGE.read_text(encoding="utf-8")
    whole = page.partition("## Every stage")[2].partition("## Some stages")[0]
    if kind in re.findall(r"[\w-]+", whole):
        return dict.fromkeys(STAGES, "yes")
    (line,) = re.findall(rf"^\| {re.escape(kind)} \| (.*) \|$", page, re.MULTILINE)
    return {s: c for s, c in zip(STAGES, line.split(" | "), strict=True) if c.strip()}


def check(kind, tokenizer):
    row = try_family(kind, tokenizer)
    assert row.faults == []
    if row.model and f"transformers {transformers.__version__}," in PAGE.read_text("utf-8"):
        found = {stage: "yes" if cell == "yes" else "no" for stage, cell in row.cells.items()}
        assert found == documented(kind)
    return row


@pytest.mark.parametrize("kind", SLICE)
def test_a_family_is_exact_or_refused(kind, tokenizer):
    if kind not in families():
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    check(kind, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(families()) - set(SLICE)))
def test_every_other_family_is_exact_or_refused(kind, tokenizer):
    check(kind, tokenizer)
