"""Values that writers refuse: errors name sequence and token, and nothing is written."""

import dataclasses
import errno

import numpy as np
import pytest
from helpers_cache import make_manifest, make_pair

from lopd.errors import ConfigError, DataError, LopdError, ShardError
from lopd.store import CacheWriter, RolloutWriter, locks
from lopd.store import writer as cache_writer

BAD_ROLLOUTS = {
    "no response": ({"prompt_length": 9}, "leave no response"),
    "no prompt": ({"prompt_length": 0}, "prompt_length is 0"),
    "finish": ({"finish_reason": "eos"}, "finish_reason is 'eos'"),
    "mask": ({"loss_mask": np.ones(9, bool)}, "loss_mask is True on prompt token 0"),
    "mask length": ({"loss_mask": np.zeros(8, bool)}, r"loss_mask is bool \[8\]"),
    "float tokens": ({"tokens": np.zeros(9)}, "tokens are float64"),
    "logprobs length": ({"rollout_logprobs": np.zeros(5, np.float32)}, "rollout_logprobs is"),
    "raw nan": ({"rollout_logprobs_raw": np.full(6, np.nan, np.float32)}, "token 0 .* is nan"),
}


@pytest.mark.parametrize("change, message", BAD_ROLLOUTS.values(), ids=BAD_ROLLOUTS)
def test_bad_rollouts_are_refused_by_name(tmp_path, change, message):
    bad = dataclasses.replace(make_pair(1)[0], **change)
    with (
        RolloutWriter.create(tmp_path, make_manifest("rollouts", plan=[2])) as writer,
        pytest.raises(DataError, match=f"sequence prompt-1/1: .*{message}"),
    ):
        writer.write(0, [make_pair(0)[0], bad])
    assert not list(tmp_path.glob("shard-*"))


def spoil(field, where, value):
    def change(rollout, scores):
        values = getattr(scores, field).copy()
        values[where] = value
        return rollout, dataclasses.replace(scores, **{field: values})

    return change


def out_of_vocabulary(rollout, scores):
    rollout.tokens[5] = 40
    return rollout, scores


def overfull(rollout, scores):
    return rollout, dataclasses.replace(scores, tail_logprobs=scores.tail_logprobs * 0)


def lost_mass(rollout, scores):
    return rollout, dataclasses.replace(scores, tail_logprobs=scores.tail_logprobs - 3)


def shifted(rollout, scores):
    rollout.tokens[3:] = scores.topk_ids[:, 0]
    return rollout, dataclasses.replace(
        scores, teacher_logprobs=np.roll(scores.topk_logprobs[:, 0], 1)
    )


def above_tail(rollout, scores):
    outside = [np.setdiff1d(np.arange(40), row)[0] for row in scores.topk_ids]
    rollout.tokens[3:] = outside
    return rollout, dataclasses.replace(
        scores, teacher_logprobs=np.minimum(scores.tail_logprobs + 0.1, 0)
    )


def one_row_short(rollout, scores):
    return rollout, dataclasses.replace(scores, topk_ids=scores.topk_ids[1:])


def rising(rollout, scores):
    flipped = {name: getattr(scores, name)[:, ::-1] for name in ("topk_ids", "topk_logprobs")}
    return rollout, dataclasses.replace(scores, **flipped)


def as_extra(rollout, scores):
    """A list that is not the teacher's own: its ids are extra ids, in any order."""
    rollout.tokens[3:] = scores.topk_ids[:, 0]
    return rollout, dataclasses.replace(
        scores,
        teacher_logprobs=scores.topk_logprobs[:, 0],
        topk_ids=scores.topk_ids[:, :0],
        topk_logprobs=scores.topk_logprobs[:, :0],
        tail_logprobs=np.zeros_like(scores.tail_logprobs),
        extra_ids=scores.topk_ids[:, ::-1],
        extra_logprobs=scores.topk_logprobs[:, ::-1],
        extra_tail_logprobs=scores.tail_logprobs,
    )


BAD_SCORES = {
    "nan list": (
        spoil("topk_logprobs", (2, 5), np.nan),
        r"topk_logprobs of response token 2 .*nan",
    ),
    "inf list": (
        spoil("topk_logprobs", (2, 7), -np.inf),
        r"topk_logprobs of response token 2 .*-inf",
    ),
    "nan own": (spoil("teacher_logprobs", 4, np.nan), r"teacher_logprobs of response token 4"),
    "positive": (spoil("teacher_logprobs", 1, 0.5), r"teacher_logprobs of response token 1 .*0\.5"),
    "nan tail": (spoil("tail_logprobs", 3, np.nan), r"tail_logprobs of response token 3"),
    "nan entropy": (spoil("teacher_entropy", 0, np.nan), r"teacher_entropy of response token 0"),
    "negative id": (spoil("topk_ids", (1, 0), -1), r"topk_ids of response token 1 .*-1"),
    "id beyond": (spoil("topk_ids", (1, 0), 40), r"topk_ids of response token 1 .*\[0, 40\)"),
    "token beyond": (out_of_vocabulary, r"token 5 has id 40"),
    "mass above one": (overfull, r"mass of list and tail .*expected 1"),
    "mass below one": (lost_mass, r"mass of list and tail"),
    "off by one": (shifted, r"teacher_logprobs of response token .*entry in its list"),
    "above the tail": (above_tail, r"teacher_logprobs of .* at most the tail"),
    "lengths": (one_row_short, r"topk_ids is int32 \[5, 8\], expected integers \[6, 8\]"),
    "rising": (rising, r"topk_logprobs of response token 0 .*descending"),
}


@pytest.mark.parametrize("change, message", BAD_SCORES.values(), ids=BAD_SCORES)
def test_bad_scores_are_refused_by_name_and_finished_shards_stay(tmp_path, change, message):
    good, bad = make_pair(0)[:2], change(*make_pair(1)[:2])
    with CacheWriter.create(tmp_path, make_manifest(plan=[1, 1])) as writer:
        writer.write(0, [good])
        with pytest.raises(DataError, match=f"sequence prompt-1/1: {message}"):
            writer.write(1, [bad])
        assert writer.missing() == [1]


def test_duplicates_are_refused(tmp_path):
    rollout, scores, _ = make_pair(1)
    scores.topk_ids[3, 6] = scores.topk_ids[3, 2]
    with CacheWriter.create(tmp_path, make_manifest(plan=[2])) as writer:
        with pytest.raises(DataError, match="response token 3 .*distinct"):
            writer.write(0, [make_pair(0)[:2], (rollout, scores)])
        with pytest.raises(DataError, match=r"prompt-0/0 is twice in shard 0"):
            writer.write(0, [make_pair(0)[:2]] * 2)
        with pytest.raises(DataError, match="found 1 sequences; expected 2, as planned"):
            writer.write(0, [make_pair(0)[:2]])


def test_packed_refuses_what_fp16_cannot_hold(tmp_path):
    rollout, scores, _ = make_pair(0)
    scores.topk_logprobs[:, 0] = 0
    scores.topk_logprobs[:, 1:] = -70000.0
    scores.tail_logprobs[:] = -70000.0
    scores.teacher_logprobs[:] = -70000.0
    rollout.tokens[3:] = scores.topk_ids[:, 4]
    manifest = make_manifest(plan=[1], codec="packed")
    with (
        CacheWriter.create(tmp_path, manifest) as writer,
        pytest.raises(DataError, match="prompt-0/0: the list of response token 0 has log-prob"),
    ):
        writer.write(0, [(rollout, scores)])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": -1}, r"has no k that is .*\(found -1\)"),
        ({"k": 41}, "k is 41"),
        ({"top_p": 0}, r"has no top_p that is .*\(found 0\)"),
        ({"codec": "zip"}, "codec is 'zip'"),
        ({"plan": []}, r"plan\.shards \[\]; expected 1 or more"),
        ({"plan": [0, 2]}, r"plan\.shards \[0, 2\]; expected 1 or more"),
        ({"vocab_size": None}, "has no model.vocab_size"),
    ],
)
def test_bad_manifests_are_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        CacheWriter.create(tmp_path / "new", make_manifest(**change))
    assert not (tmp_path / "new").exists()


MODEL_FILES = {"config.json": "{}", "model.safetensors": "weights", ".gitattributes": ""}


@pytest.mark.parametrize("name", [*MODEL_FILES, "notes.tmp"])
def test_a_folder_of_something_else_is_left_as_it_is(tmp_path, name):
    (tmp_path / name).write_text(MODEL_FILES.get(name, ""))
    with pytest.raises(ShardError, match=f"holds {name} and no manifest.json"):
        RolloutWriter.create(tmp_path, make_manifest("rollouts"))
    assert [item.name for item in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("text", ["{}", '{"kind": "cache", "schema": 1}', "{"])
def test_a_foreign_manifest_is_left_as_it_is(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="manifest.json"):
        RolloutWriter.create(tmp_path, make_manifest("rollouts"))
    assert [item.name for item in tmp_path.iterdir()] == ["manifest.json"]


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path):
    for name in (".lock", ".manifest.json.123.tmp", "teacher_vocab.json"):
        (tmp_path / name).write_text("")
    with RolloutWriter.create(tmp_path, make_manifest("rollouts", plan=[1])) as writer:
        assert writer.missing() == [0]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(ShardError, match="out.* is a file; choose another"):
            RolloutWriter.create(out, make_manifest("rollouts"))
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("where", ["remove_temporaries", "write_manifest"])
def test_a_folder_that_cannot_be_written_is_refused_and_unlocked(tmp_path, monkeypatch, where):
    def denied(*args):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(locks if where == "remove_temporaries" else cache_writer, where, denied)
        with pytest.raises(LopdError, match=r"cannot be made or written \(Permission denied\)"):
            RolloutWriter.create(tmp_path, make_manifest("rollouts"))
    RolloutWriter.create(tmp_path, make_manifest("rollouts")).close()


STUDENTS = {"ids": "student's top k", "list_of": "student"}
BAD_LISTS = {
    "off by one": ({"teacher_logprobs": (1, 0)}, r"teacher_logprobs of .*entry in its list"),
    "lost mass": ({"extra_tail_logprobs": (0, -0.5)}, r"mass of list, extra ids and tail"),
}


@pytest.mark.parametrize("shift, message", BAD_LISTS.values(), ids=BAD_LISTS)
def test_a_students_list_is_checked_as_the_teachers_is(tmp_path, shift, message):
    manifest = make_manifest(plan=[1], scoring={"support": STUDENTS})
    rollout, scores = as_extra(*make_pair(1)[:2])
    ((field, (places, offset)),) = shift.items()
    wrong = np.minimum(np.roll(getattr(scores, field), places) + offset, 0)
    with CacheWriter.create(tmp_path, manifest) as writer:
        with pytest.raises(DataError, match=message):
            writer.write(0, [(rollout, dataclasses.replace(scores, **{field: wrong}))])
        writer.write(0, [(rollout, scores)])
