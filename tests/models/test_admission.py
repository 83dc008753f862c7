"""Models that cannot be used exactly are refused before a stage begins, with the reason."""

import numpy as np
import pytest
import torch
from helpers_training import tiny_model, tiny_moe, tiny_window

from benchmarks.families import byte_tokenizer
from benchmarks.tiny_families import tiny_config
from benchmarks.tiny_families import tiny_model as family_model
from lopd.engines.base import Sampling
from lopd.engines.transformers import TransformersEngine
from lopd.errors import DataError, ModelError
from lopd.models.admission import check_model
from lopd.models.architecture import context_of_config
from lopd.models.head import check_trainable
from lopd.models.load import load_model


def test_weights_that_are_not_finite_are_named():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite values in 1 weights, such as model.laye"):
        check_model(model)


def test_activations_beyond_the_dtype_are_not_blamed_on_the_weights():
    model = tiny_model().to(torch.float16)
    model.model.norm.weight.data.fill_(6e4)
    with pytest.raises(ModelError, match="in torch.float16, although its weights are finite; use"):
        check_model(model)


def test_a_model_that_sees_later_tokens_is_refused():
    with pytest.raises(ModelError, match="later tokens change the hidden states of earlier ones"):
        check_model(family_model("bert-generation"))


@pytest.mark.parametrize("window", [None, 12])
def test_a_model_that_sees_its_neighbours_is_refused(window, monkeypatch):
    """Also one that does so only beyond its window."""
    model = tiny_model() if window is None else tiny_window()
    if window is not None:
        model.config.sliding_window = window
    check_model(model)
    forward = model.model.forward

    def leaky(input_ids=None, **kwargs):
        outputs = forward(input_ids=input_ids, **kwargs)
        if len(input_ids) > 1 and input_ids.shape[1] > (window or 0):
            outputs.last_hidden_state = outputs.last_hidden_state + 0.01
        return outputs

    monkeypatch.setattr(model.model, "forward", leaky)
    with pytest.raises(ModelError, match="in a padded batch its hidden states differ by"):
        check_model(model)


def test_a_probe_that_fails_is_a_refusal(monkeypatch):
    model = tiny_model()

    def broken(**kwargs):
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(ModelError, match=r"fails on a few tokens \(TypeError: 'NoneType' object"):
        check_model(model)


def test_a_router_whose_loss_cannot_be_computed_is_refused_before_training_only(monkeypatch):
    model = tiny_moe("qwen3_moe")
    check_trainable(model)
    forward = model.model.forward

    def silent(output_router_logits=None, **kwargs):
        return forward(**kwargs)

    monkeypatch.setattr(model.model, "forward", silent)
    check_model(model)
    with pytest.raises(ModelError, match="returned no router logits"):
        check_model(model, trained=True)


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("phi3", {}, 128),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            128,
        ),
        (
            "phi3",
            {
                "original_max_position_embeddings": 32,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 1e4,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            },
            32,
        ),
    ],
    ids=["default", "dynamic", "longrope"],
)
def test_sequences_end_where_rotations_of_a_batch_change(kind, changes, expected, tmp_path):
    """Beyond, a long row of a batch would change the outputs of its neighbours."""
    config = tiny_config(kind, **changes)
    assert context_of_config(config) == expected
    model = family_model(kind, **changes)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    engine = TransformersEngine.load(tmp_path, dtype="float32", device="cpu")
    tokens = [np.arange(3, 3 + n, dtype=np.int32) % 96 for n in (expected, 5)]
    (score, _) = engine.score(tokens, [2, 2], 3)
    ids = torch.as_tensor(tokens[0]).long()[None]
    exact = model(input_ids=ids).logits[0].log_softmax(-1)[1:-1]
    found = exact.gather(1, ids[0, 2:, None])[:, 0].detach().numpy()
    np.testing.assert_allclose(score.teacher_logprobs, found, atol=1e-4)
    with pytest.raises(DataError, match=f"expected at most {expected}, the context of"):
        engine.score([np.ones(expected + 1, np.int32)], [2], 3)


def test_sparse_attention_ends_where_it_begins_to_select():
    config = tiny_config("deepseek_v32", index_topk=16)
    assert context_of_config(config) == 16
    assert context_of_config(config, "vllm") == 128


def test_soft_caps_of_attention_are_applied(tmp_path):
    """sdpa leaves them out; a cap of 1 changes these outputs by far more than rounding."""
    model = family_model("gemma2")
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device="cpu")
    model.set_attn_implementation("eager")
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation("sdpa")
    assert (model(ids).logits - loaded(ids).logits).abs().max() > 1e-2


def test_decoding_that_depends_on_padding_is_refused_unless_there_is_none(tmp_path):
    """BART counts its positions from the left, padding included."""
    family_model("bart").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    prompts, sampling = [[5, 6], [7, 8, 9, 10]], Sampling(5)
    engine = TransformersEngine.load(tmp_path, dtype="float32", device="cpu")
    with pytest.raises(ModelError, match="in cached decoding, log-probs differ.*--batch-size 1"):
        engine.generate(prompts, sampling, [0, 1])
    engine = TransformersEngine.load(tmp_path, dtype="float32", device="cpu", batch_size=1)
    answers = engine.generate(prompts, sampling, [0, 1])
    tokens = [np.array([*p, *a.tokens], np.int32) for p, a in zip(prompts, answers, strict=True)]
    for answer, score in zip(answers, engine.score(tokens, [2, 4], 1), strict=True):
        np.testing.assert_allclose(answer.logprobs_raw, score.teacher_logprobs, atol=1e-4)
