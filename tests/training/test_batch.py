"""Batches hold exactly the loss rows, and data that cannot be trained on are refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers_cache import make_manifest, write_cache
from helpers_training import make_rollouts, make_scored

from lopd.config.prompts import PromptOptions
from lopd.data.demonstrations import load_demonstrations
from lopd.data.rendering import PromptEncoder
from lopd.errors import ConfigError, DataError, MissingFileError, ModelError
from lopd.stages.demo import arithmetic as toy
from lopd.store import Rollout, TeacherCache, TopKLists
from lopd.training.batch import Collator, SequenceDataset, lengths_of


def rollout(tokens, prompt_length, mask=None, name="p"):
    length = len(tokens)
    response = np.arange(length - prompt_length, dtype=np.float32)
    return Rollout(
        prompt_id=name,
        sample=3,
        tokens=np.array(tokens, np.int32),
        prompt_length=prompt_length,
        finish_reason="stop",
        loss_mask=np.array(mask, bool) if mask else np.arange(length) >= prompt_length,
        rollout_logprobs=-response,
        rollout_logprobs_raw=-response,
    )


def test_collator_pads_right_and_indexes_the_predicting_positions():
    first = rollout([5, 6, 7, 8, 9], 2, mask=[0, 0, 1, 0, 1], name="a")
    second = rollout([1, 2, 3], 1, name="b")
    batch = Collator(pad_token_id=11)([first, second])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 11, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["loss_index"].tolist() == [1, 3, 5, 6]
    assert batch["labels"].tolist() == [7, 9, 2, 3]
    assert batch["sequence_index"].tolist() == [0, 0, 1, 1]
    assert batch["rollout_logprobs"].tolist() == [0.0, -2.0, 0.0, -1.0]
    assert batch["row_weights"].tolist() == [1.0, 1.0, 1.0, 1.0]
    assert batch["sequence_names"] == ["a/3", "b/3"]
    integers = ("input_ids", "attention_mask", "loss_index", "labels", "sequence_index")
    assert all(batch[name].dtype == torch.int64 for name in integers)


def test_sequence_mean_weighs_by_loss_tokens_and_sums_to_the_sequences():
    first = rollout([5, 6, 7, 8, 9], 1, mask=[0, 0, 1, 1, 1])
    batch = Collator("sequence_mean")([first, rollout([1, 2], 1)])
    assert batch["row_weights"].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_teacher_columns_follow_the_loss_rows_and_pad_shorter_lists():
    items = make_scored(make_rollouts(3))
    mask = items[1].rollout.loss_mask.copy()
    mask[items[1].rollout.prompt_length] = False  # the first response token bears no loss
    items[1] = dataclasses.replace(
        items[1], rollout=dataclasses.replace(items[1].rollout, loss_mask=mask)
    )
    batch = Collator()(items)
    lengths = [len(item.teacher_logprobs) for item in items]
    n = sum(lengths) - 1
    assert batch["topk_ids"].shape == batch["topk_logprobs"].shape == (n, 4)
    assert batch["topk_ids"].dtype == torch.int32
    short = lengths[0]
    assert (batch["topk_ids"][:short, 3] == -1).all() and (batch["topk_ids"][short:] >= 0).all()
    assert (batch["topk_logprobs"][:short, 3] == -torch.inf).all()
    rows = batch["sequence_index"] == 1
    for name in ("teacher_logprobs", "teacher_entropy", "tail_logprobs", "topk_ids"):
        assert np.array_equal(batch[name][rows].numpy(), getattr(items[1], name)[1:]), name


def padded_columns(items, offsets):
    """Lists as [R, K_i] arrays per sequence, sliced and copied into one [N, K] array."""
    rows, width = sum(map(len, offsets)), max(item.topk_ids.shape[1] for item in items)
    ids = np.full((rows, width), -1, dtype=np.int32)
    logprobs = np.full((rows, width), -np.inf, dtype=np.float32)
    start = 0
    for item, offset in zip(items, offsets, strict=True):
        end, k = start + len(offset), item.topk_ids.shape[1]
        ids[start:end, :k] = item.topk_ids[offset]
        logprobs[start:end, :k] = item.topk_logprobs[offset]
        start = end
    return ids, logprobs


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_ragged_lists_are_padded_as_rectangular_ones(seed, packed):
    """Mixed widths, lists without entries, and loss masks that skip the longest list."""
    rng = np.random.default_rng(seed)
    items = []
    for item in make_scored(make_rollouts(5, seed=seed), k=12, seed=seed):
        lengths = rng.integers(0, rng.integers(1, 13), len(item.teacher_logprobs))
        ids = np.where(np.arange(item.topk_ids.shape[1]) < lengths[:, None], item.topk_ids, -1)
        mask = item.rollout.loss_mask & (rng.random(len(item.rollout.tokens)) < 0.7)
        mask[-1] = True
        changed = dataclasses.replace(item.rollout, loss_mask=mask)
        lists = TopKLists.from_padded(ids, item.topk_logprobs)
        items.append(dataclasses.replace(item, rollout=changed, lists=lists))
    batch = Collator(packed=packed)(items)
    offsets = [
        np.flatnonzero(item.rollout.loss_mask) - item.rollout.prompt_length for item in items
    ]
    ids, logprobs = padded_columns(items, offsets)
    assert batch["topk_ids"].dtype == torch.int32 and batch["topk_logprobs"].dtype == torch.float32
    assert np.array_equal(batch["topk_ids"].numpy(), ids)
    assert np.array_equal(batch["topk_logprobs"].numpy(), logprobs)
    assert batch["unlisted"].tolist() == np.flatnonzero((ids < 0).all(axis=1)).tolist()
    starts = np.cumsum([0, *(len(item.rollout.tokens) for item in items)])
    starts = starts if packed else np.arange(5) * batch["input_ids"].shape[1]
    rows = [
        start + item.rollout.prompt_length + offset - 1
        for start, item, offset in zip(starts, items, offsets, strict=False)
    ]
    assert batch["loss_index"].tolist() == np.concatenate(rows).tolist()


def test_batches_of_a_store_are_read_together_and_are_the_same(tmp_path, monkeypatch):
    write_cache(tmp_path, make_manifest(codec="compact", plan=(4, 3, 2)))
    cache = TeacherCache.open(tmp_path)
    dataset = SequenceDataset(cache, context=9, vocab_size=40, drop_truncated=True)
    batches = [[3, 0], [1, 2]]
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=Collator())
    expected = [Collator()([dataset[i] for i in batch]) for batch in batches]
    reads, read = [], TeacherCache.read
    monkeypatch.setattr(TeacherCache, "read", lambda s, i: reads.append(list(i)) or read(s, i))
    for found, batch in zip(loader, expected, strict=True):
        assert found["sequence_names"] == batch["sequence_names"]
        for name in ("input_ids", "labels", "topk_ids", "topk_logprobs", "tail_logprobs"):
            assert torch.equal(found[name], batch[name]), name
    assert reads == [[7, 1], [3, 5]]  # the others are truncated


def test_unknown_rollout_logprobs_are_left_out_of_the_batch():
    known, unknown = rollout([5, 6, 7], 1), rollout([5, 6, 7], 1)
    unknown.rollout_logprobs[:] = np.nan
    assert "rollout_logprobs" in Collator()([known, known])
    assert "rollout_logprobs" not in Collator()([known, unknown])


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ConfigError, match="token_mean, sequence_mean"):
        Collator("mean")


def test_dataset_drops_truncated_sequences_and_tells_the_share(capsys):
    rollouts = make_rollouts(8, truncated=(1, 5))
    dataset = SequenceDataset(rollouts, drop_truncated=True)
    told = "drop_truncated: left out 2 of 8 sequences (25.0 %)\n"
    assert capsys.readouterr().err == told
    assert [item.prompt_id for item in dataset] == ["p0", "p2", "p3", "p4", "p6", "p7"]
    assert dataset.dropped_share == pytest.approx(0.25)
    assert len(SequenceDataset(rollouts)) == 8
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 7}, "p/3: found 8 tokens; expected at most 7, the context"),
        ({"vocab_size": 30}, r"token 7 has id 30; expected ids in \[0, 30\), the vocabulary"),
    ],
)
def test_dataset_refuses_what_the_model_cannot_read(change, message):
    tokens = [1, 2, 3, 4, 5, 6, 7, 30]
    SequenceDataset([rollout(tokens, 2)], context=8, vocab_size=31)
    with pytest.raises(DataError, match=message):
        SequenceDataset([rollout(tokens, 2)], **change)


def test_dataset_refuses_to_be_empty():
    with pytest.raises(DataError, match="no sequence of 0"):
        SequenceDataset([])
    with pytest.raises(DataError, match="left once truncated ones are dropped"):
        SequenceDataset(make_rollouts(2, truncated=(0, 1)), drop_truncated=True)
    with pytest.raises(DataError, match="p/3: no token bears loss; expected at least one"):
        SequenceDataset([rollout([1, 2], 1, mask=[0, 0])])
    with pytest.raises(DataError, match="no sequence of 2 can be used"):
        SequenceDataset([rollout([1, 2], 1, mask=[0, 0])] * 2, skip_bad=True)
    with pytest.raises(ConfigError, match="found a list; expected a .*SequenceDataset"):
        lengths_of([rollout([1, 2], 1)])


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_demonstrations_are_prompt_answer_and_eos(tmp_path):
    tokenizer = toy.build_tokenizer()
    path = write(
        tmp_path / "sft.jsonl",
        {"prompt": "3+5=", "completion": "8", "id": "first"},
        {"prompt": "1+1=", "completion": "2;"},
    )
    first, second = load_demonstrations(path, PromptEncoder(tokenizer))
    ids = tokenizer.convert_tokens_to_ids
    assert first.tokens.tolist() == [*ids(list("3+5=8")), tokenizer.eos_token_id]
    assert first.prompt_length == 4 and first.prompt_id == "first"
    assert second.prompt_id == f"{path}:2"
    assert second.loss_mask.tolist() == [False] * 4 + [True] * 3
    batch = Collator()([first, second])
    assert "rollout_logprobs" not in batch
    assert batch["labels"].tolist() == [*ids(["8"]), 1, *ids(["2", ";"]), 1]


def test_messages_end_with_the_assistants(tmp_path):
    tokenizer = toy.build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}="
    messages = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    (found,) = load_demonstrations(
        write(tmp_path / "sft.jsonl", {"messages": messages}), PromptEncoder(tokenizer)
    )
    assert tokenizer.decode(found.tokens[:4]).replace(" ", "") == "1+2="
    assert found.prompt_length == 4
    assert found.tokens.tolist()[4:] == [tokenizer.convert_tokens_to_ids("3"), 1]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "1+1="},
        {"prompt": "1+1=", "completion": ""},
        {"prompt": "1+1=", "completion": 2},
    ],
)
def test_a_line_without_an_answer_is_named(tmp_path, record):
    path = write(tmp_path / "sft.jsonl", {"prompt": "1+1=", "completion": "2"}, record)
    with pytest.raises(DataError, match=r"sft\.jsonl:2: found no answer"):
        load_demonstrations(path, PromptEncoder(toy.build_tokenizer()))


def test_a_blank_answer_is_refused_or_left_out(tmp_path, capsys):
    blank = [{"prompt": "1+1=", "completion": text} for text in (" ", "\n\t")]
    path = write(tmp_path / "sft.jsonl", {"prompt": "1+1=", "completion": "2"}, *blank)
    with pytest.raises(DataError, match=r"sft\.jsonl:2: the answer is blank.*--skip-bad-records"):
        load_demonstrations(path, PromptEncoder(toy.build_tokenizer()))
    options = PromptOptions(skip_bad_records=True)
    (found,) = load_demonstrations(path, PromptEncoder(toy.build_tokenizer(), options))
    assert found.prompt_id == f"{path}:1"
    assert "left out 2 of 3 records" in capsys.readouterr().err


def test_jsonl_errors(tmp_path):
    tokenizer = toy.build_tokenizer()
    with pytest.raises(MissingFileError):
        load_demonstrations(tmp_path / "absent.jsonl", PromptEncoder(tokenizer))
    with pytest.raises(DataError, match="no demonstrations"):
        load_demonstrations(write(tmp_path / "empty.jsonl"), PromptEncoder(tokenizer))
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        load_demonstrations(
            write(tmp_path / "x.jsonl", {"prompt": "1", "completion": "2"}),
            PromptEncoder(tokenizer),
        )
