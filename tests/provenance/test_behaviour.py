"""What a folder computes with besides its weights, by name."""

import json

import pytest
from helpers_provenance import VOCAB, make_model

from lopd.errors import DataError
from lopd.provenance import behaviour_of, chat_template_digest, difference, eos_ids_of
from lopd.provenance.remote_code import trusting_code


def edit(file, **changes):
    value = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**value, **changes}))


def normalise(folder):
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})


CHANGES = {
    "config.rope_parameters.factor was None, is 4.0": lambda f: edit(
        f / "config.json", rope_parameters={"rope_type": "yarn", "factor": 4.0}
    ),
    "generation_config.eos_token_id was None, is 7": lambda f: edit(
        f / "generation_config.json", eos_token_id=7
    ),
    "tokenizer.normalizer.type was None, is 'Lowercase'": normalise,
    "tokenizer.add_bos_token was None, is True": lambda f: edit(
        f / "tokenizer_config.json", add_bos_token=True
    ),
    "chat_template was None, is": lambda f: (f / "chat_template.jinja").write_text("{{ x }}"),
}


@pytest.mark.parametrize("words", CHANGES)
def test_every_file_that_decides_what_is_computed_counts_and_is_named(tmp_path, words):
    folder = make_model(tmp_path / "m")
    before = behaviour_of(folder)
    CHANGES[words](folder)
    assert words in difference(before, behaviour_of(folder), most=9)


def test_how_a_folder_was_saved_and_the_settings_of_the_sampler_do_not_count(tmp_path):
    folder = make_model(tmp_path / "m")
    before = behaviour_of(folder)
    saved = {"transformers_version": "9", "dtype": "float16", "use_cache": False}
    edit(folder / "config.json", **saved)
    edit(folder / "generation_config.json", **saved, temperature=0.6, do_sample=True)
    edit(folder / "tokenizer_config.json", name_or_path="x", padding_side="left")
    edit(folder / "tokenizer.json", truncation=None)
    assert behaviour_of(folder) == before


def test_long_and_infinite_values_fit_into_a_manifest(tmp_path):
    folder = make_model(tmp_path / "m")
    edit(folder / "config.json", layer_types=["full_attention"] * 99, limit=float("inf"))
    behaviour = behaviour_of(folder)
    assert len(behaviour["config"]["layer_types"]) == 64  # hex digits
    assert behaviour["config"]["limit"] == "inf"
    assert len(json.dumps(behaviour, allow_nan=False)) < 4096


def test_code_counts_where_it_is_run(tmp_path):
    folder = make_model(tmp_path / "m")
    edit(folder / "config.json", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("1")
    assert "code" not in behaviour_of(folder)
    with trusting_code(True):
        assert set(behaviour_of(folder)["code"]) == {"code.py"}


def test_named_templates_count(tmp_path):
    folder = make_model(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ x }}")
    one = chat_template_digest(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ y }}")
    both = chat_template_digest(folder)
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template="{{ x }}")
    assert chat_template_digest(folder) == both != one
    edit(folder / "tokenizer_config.json", chat_template="{{ z }}")
    assert chat_template_digest(folder) not in (both, one)


def test_ids_that_end_an_answer_are_those_of_generation_config_and_tokenizer(tmp_path):
    folder = make_model(tmp_path / "m")
    assert eos_ids_of(folder) is None
    edit(folder / "config.json", text_config={"eos_token_id": 3})
    assert eos_ids_of(folder) == [3]
    edit(folder / "config.json", eos_token_id=4)
    edit(folder / "tokenizer_config.json", eos_token={"content": "<eos>"})
    assert eos_ids_of(folder) == sorted([4, VOCAB["<eos>"]])
    edit(folder / "generation_config.json", eos_token_id=[5, 6])
    assert eos_ids_of(folder) == sorted([5, 6, VOCAB["<eos>"]])
    edit(folder / "generation_config.json", eos_token_id="five")
    with pytest.raises(DataError, match="eos_token_id is 'five'"):
        eos_ids_of(folder)


@pytest.mark.parametrize(
    "name",
    ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"],
)
@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1, "a": 2}'])
def test_a_damaged_optional_file_is_not_an_absent_one(tmp_path, name, content):
    folder = make_model(tmp_path / "m")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"{name} .*restore it"):
        behaviour_of(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / "gone")
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        behaviour_of(folder)
