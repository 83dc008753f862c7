"""Chat templates of published models, as TRL has them: prompts as transformers gives them."""

import re
import sys
from pathlib import Path

import pytest
from conftest import train_bpe

from lopd.config.prompts import PromptOptions
from lopd.data.rendering import PromptEncoder
from lopd.errors import DataError

# Not imported, which would import all of TRL.
FOLDER = next((f for f in (Path(p) / "trl/chat_templates" for p in sys.path) if f.is_dir()), None)
NAMES = (
    sorted(file.name for file in FOLDER.glob("*.jinja") if not file.stem.endswith("_training"))
    if FOLDER
    else []
)
SPECIAL = r"<\|[^|>\n]+\|>|<(?:bos|start_of_turn|end_of_turn|turn\||\|turn)>|\[/?INST\]|</?s>"
TEXT = "the cat sat"
# Variables that users set, and the only ones that these templates take.
TAKEN = {
    "gptoss": "builtin_tools model_identity reasoning_effort tools",
    "llama3_2": "custom_tools date_string tools tools_in_user_message",
    "qwen2_5": "tools",
    "qwen3": "enable_thinking tools",
    "gemma3": "",
    "gemma4_v5": "enable_thinking preserve_thinking tools",
    "deepseek_r1_distill": "",
}


def tokenizer_of(name):
    template = (FOLDER / name).read_text(encoding="utf-8")
    tokenizer = train_bpe(template)
    special = sorted(set(re.findall(SPECIAL, template)))
    tokenizer.add_special_tokens({"extra_special_tokens": special})
    tokenizer.bos_token = "<pad>"
    return tokenizer


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_what_transformers_renders_and_is_not_rendered_twice(name):
    tokenizer = tokenizer_of(name)
    encoder = PromptEncoder(tokenizer)
    tokens = encoder.encode(TEXT, {}, "x")
    content = TEXT
    if name.startswith(("idefics", "llava", "smolvlm")):  # these write the text of parts only
        content = [{"type": "text", "text": TEXT}]
    assert tokens == tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False
    )
    text = tokenizer.decode(tokens)
    assert TEXT in text
    with pytest.raises(DataError, match="a template seems to be applied already"):
        encoder.encode(text, {}, "x")
    as_text = PromptEncoder(tokenizer, PromptOptions(special_tokens="as_text"))
    assert as_text.encode(text, {}, "x") == tokens


@pytest.mark.skipif(not NAMES, reason="needs TRL's chat templates")
@pytest.mark.parametrize("name", TAKEN)
def test_the_variables_of_a_template_are_those_that_it_takes(name):
    fixed = {"messages", "add_generation_prompt", "raise_exception", "strftime_now"}
    found = PromptEncoder(tokenizer_of(f"{name}.jinja")).variables - fixed
    assert found - {"bos_token", "eos_token"} == set(TAKEN[name].split())
