"""Fine-tuning on sampled answers and on demonstrations, and the lineage that it records."""

import json

import pytest
import torch
import transformers
from helpers_artefacts import describe, write_model, write_sequences

from lopd.config.evaluate import EvalConfig
from lopd.errors import ConfigError, MissingFileError, ProvenanceError
from lopd.models.load import load_model
from lopd.provenance import lineage_of, read_manifest, save_vocab
from lopd.stages import evaluate, sft
from lopd.stages.demo import arithmetic as toy
from lopd.training.logging import LOG_NAME

SETTINGS = {
    "max_steps": 5,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "device": "cpu",
    "save_every": 0,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_model(folder / "teacher", seed=1)
    write_model(folder / "base", seed=2)
    write_sequences(folder / "sft-data", folder / "teacher", kind="sft_data", truncated=(3,))
    return folder


def config(folder, out, **changes):
    paths = {"model": str(folder / "base"), "data": str(folder / "sft-data"), "out": str(out)}
    return sft.SftConfig(**{**paths, **SETTINGS, **changes})


def test_sft_on_sampled_answers_records_their_teacher(folder, tmp_path, capsys):
    out = sft.main(config(folder, tmp_path / "out", drop_truncated=True))
    manifest = read_manifest(out, kind="checkpoint").raw
    teacher = describe(folder / "teacher")
    assert manifest["model"]["weights"] == describe(out).weights
    assert manifest["base"]["weights"] == describe(folder / "base").weights
    assert manifest["inputs"]["sft_data"]["model"]["weights"] == teacher.weights
    assert manifest["training"]["sequences"] == 11
    assert lineage_of(out).raw == {
        "sft_teacher": teacher.as_teacher(),
        "declared": False,
        "initial_student": None,
    }
    capsys.readouterr()
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert sft.main(config(folder, out, drop_truncated=True)) == out
    assert f"{out}: finished already, nothing to do\n" == capsys.readouterr().err
    assert before == {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    sft.main(config(folder, tmp_path / "all", max_steps=1))
    assert "training data: 1 of 12 answers (8%) were cut off" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"another recipe \(drop_truncated was True, is False\)"):
        sft.main(config(folder, out))
    prompts = toy.write_prompts(tmp_path / "p.jsonl", toy.sample_prompts(2, 0, exclude=set()))
    evaluation = EvalConfig(
        model=str(out), prompts=str(prompts), out=str(out), max_new_tokens=4, device="cpu"
    )
    # It is of no use to tell somebody to remove the result of another stage.
    with pytest.raises(
        ConfigError, match="holds 'checkpoint' of 'lopd sft'; choose a new or empty"
    ):
        evaluate.main(evaluation)


def test_sft_on_demonstrations_learns_them_and_records_no_teacher(folder, tmp_path):
    prompts = toy.sample_prompts(16, 0, exclude=set())
    data = toy.write_prompts(tmp_path / "sft.jsonl", prompts, completions=True)
    settings = {"data": str(data), "max_steps": 80, "batch_size": 16, "learning_rate": 1e-2}
    out = sft.main(config(folder, tmp_path / "out", **settings))
    assert lineage_of(out).sft_teacher is None
    assert "sha256" in read_manifest(out).inputs["demonstrations"]
    losses = [json.loads(line)["loss"] for line in (out / LOG_NAME).read_text().splitlines()]
    assert losses[0] > 2.0 and losses[-1] < 0.5 * losses[0]

    model, tokenizer = load_model(out, dtype="float32", device="cpu"), toy.build_tokenizer()
    prompt, (solution, _) = prompts[0], toy.solve(prompts[0])
    tokens = tokenizer([prompt + solution])["input_ids"][0] + [tokenizer.eos_token_id]
    with torch.no_grad():
        log_p = torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1)
    nll = -log_p[range(len(tokens) - 1), tokens[1:]][len(prompt) - 1 :].mean().item()
    assert nll < 0.6 * losses[0]


def other_tokenizer(folder, **swap):
    """Replace tokens in the tokenizer of a model folder."""
    file = folder / "tokenizer.json"
    settings = json.loads(file.read_text())
    vocab = settings["model"]["vocab"]
    settings["model"]["vocab"] = {swap.get(token, token): i for token, i in vocab.items()}
    file.write_text(json.dumps(settings))


def test_answers_of_another_tokenizer_are_refused_before_a_model_is_loaded(
    folder, tmp_path, monkeypatch
):
    def explode(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", explode)
    base = write_model(tmp_path / "base", seed=2)
    other_tokenizer(base, **{"3": "x"})
    with pytest.raises(ProvenanceError, match="vocabulary, needed to compare them, is missing"):
        sft.main(config(folder, tmp_path / "out", model=str(base)))
    data = write_sequences(tmp_path / "data", folder / "teacher", kind="sft_data")
    save_vocab(folder / "teacher", data)
    with pytest.raises(ProvenanceError, match="is '3' to the teacher and 'x' to"):
        sft.main(config(folder, tmp_path / "out", model=str(base), data=str(data)))
    assert not (tmp_path / "out").exists()


def test_tokenizer_that_differs_in_unused_ids_only_is_accepted(folder, tmp_path):
    base = write_model(tmp_path / "base", seed=2)
    data = write_sequences(tmp_path / "data", folder / "teacher", kind="sft_data", vocab=20)
    save_vocab(folder / "teacher", data)
    unused = toy.build_tokenizer().convert_ids_to_tokens(25)
    other_tokenizer(base, **{unused: "unused"})
    sft.main(config(folder, tmp_path / "out", model=str(base), data=str(data), max_steps=1))


def test_missing_inputs_are_named(folder, tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        sft.main(config(folder, tmp_path / "out", model=str(tmp_path / "nowhere")))
    with pytest.raises(MissingFileError, match="nowhere"):
        sft.main(config(folder, tmp_path / "out", data=str(tmp_path / "nowhere")))
