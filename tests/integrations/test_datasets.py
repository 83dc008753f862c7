"""Caches as `datasets.Dataset` and back: exact, and clear about what cannot be read."""

import dataclasses
import math

import numpy as np
import pytest
from helpers_artefacts import write_cache, write_model, write_sequences
from helpers_cache import make_manifest, make_pair

from lopd.config.import_scores import ImportConfig
from lopd.errors import ConfigError, DataError, ShardError
from lopd.provenance import declare
from lopd.stages.import_scores import main as import_scores
from lopd.store import CacheWriter, TeacherCache
from lopd.training.batch import Collator, SequenceDataset

datasets = pytest.importorskip("datasets", reason="part of the extra `trl`")

from lopd.integrations.dataset_columns import COLUMNS, REQUIRED  # noqa: E402
from lopd.integrations.datasets import from_dataset, to_dataset  # noqa: E402

GIVEN = {"weight", "reward", "token_weights"}
SEVERAL = {"teacher_id"}
FIELDS = ("teacher_logprobs", "teacher_entropy", "tail_logprobs")


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        a, b = one.rollout, other.rollout
        for name in ("prompt_id", "sample", "prompt_length", "finish_reason", "weight", "reward"):
            assert getattr(a, name) == getattr(b, name)
            assert type(getattr(a, name)) is type(getattr(b, name))
        assert one.teacher_id == other.teacher_id
        assert (a.token_weights is None) == (b.token_weights is None)
        pairs = [(getattr(one, name), getattr(other, name)) for name in FIELDS]
        pairs += [
            (getattr(a, name), getattr(b, name))
            for name in ("tokens", "loss_mask", "rollout_logprobs", "rollout_logprobs_raw")
        ]
        pairs += [
            (getattr(one.lists, name), getattr(other.lists, name))
            for name in ("ids", "logprobs", "lengths")
        ]
        for left, right in pairs:
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)


def make_record(index):
    """Tokens below 30, lists of ids below 40; one token is masked, raw log-probs differ."""
    rollout, scores, dense = make_pair(index, length=4 + index, raw_differs=True)
    rollout.tokens[:] %= 30
    rollout.loss_mask[-2] = False
    sampled = rollout.tokens[rollout.prompt_length :, None]
    scores.teacher_logprobs[:] = np.take_along_axis(dense, sampled, axis=1)[:, 0]
    return rollout, scores


def cache_of(folder, codec="exact", **extra):
    """Five sequences in three shards, with lists cut at top_p."""
    records = [make_record(index) for index in range(5)]
    with CacheWriter.create(folder, make_manifest(codec=codec, top_p=0.9, **extra)) as writer:
        writer.write(0, records[:2])
        writer.write(1, records[2:3])
        writer.write(2, records[3:])
        writer.finish()
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return to_dataset(TeacherCache.open(cache_of(tmp_path_factory.mktemp("one") / "cache")))


@pytest.mark.parametrize("codec", ["exact", "packed", "compact"])
@pytest.mark.parametrize("support", ["list", "list+sampled"])
@pytest.mark.parametrize("vocab_size", [None, 30])
def test_a_round_trip_is_exact(tmp_path, codec, support, vocab_size):
    folder = cache_of(tmp_path / "cache", codec)
    cache = TeacherCache.open(folder, support=support, vocab_size=vocab_size)
    dataset = to_dataset(cache)
    assert {*dataset.column_names} == {*COLUMNS} - GIVEN - SEVERAL
    listed = [ids for row in dataset["topk_ids"] for ids in row]
    assert len({*map(len, listed)}) > 2  # ragged
    assert (max(map(max, listed)) < 30) == (vocab_size is not None)
    assert_same([*from_dataset(dataset, support=support)], [*cache])


def test_support_and_vocabulary_are_those_of_a_cache(tmp_path):
    folder = cache_of(tmp_path / "cache")
    dataset = to_dataset(TeacherCache.open(folder, support="list"))
    for support in ("list", "list+sampled"):
        cache = TeacherCache.open(folder, support=support, vocab_size=30)
        assert_same([*from_dataset(dataset, support=support, vocab_size=30)], [*cache])


def test_the_file_has_the_same_rows(tmp_path):
    cache = TeacherCache.open(cache_of(tmp_path / "cache"))
    mapped = to_dataset(cache, tmp_path / "scores.arrow")
    assert mapped.cache_files and [p.name for p in tmp_path.iterdir()] == ["cache", "scores.arrow"]
    assert mapped.to_list() == to_dataset(cache).to_list()
    assert_same([*from_dataset(mapped)], [*cache])


def test_formats_of_datasets_keep_the_rows(tmp_path):
    cache = TeacherCache.open(cache_of(tmp_path / "cache"))
    to_dataset(cache).to_parquet(tmp_path / "scores.parquet")
    to_dataset(cache).save_to_disk(tmp_path / "saved")
    for read in (
        datasets.Dataset.from_parquet(str(tmp_path / "scores.parquet"), cache_dir=tmp_path / "hf"),
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.Dataset.from_list(to_dataset(cache).to_list()),  # int64 and float64
        to_dataset(cache).with_format("torch"),
    ):
        assert_same([*from_dataset(read)], [*cache])


def test_what_a_cache_does_not_know_is_left_out(tmp_path):
    teacher, student = write_model(tmp_path / "teacher", seed=1), write_model(tmp_path / "student")
    declare(student, teacher=teacher)
    rollouts = write_sequences(tmp_path / "rollouts", student)
    cache = TeacherCache.open(
        write_cache(tmp_path / "cache", teacher, rollouts, has_logprobs=False)
    )
    dataset = to_dataset(cache)
    assert not {"rollout_logprobs", "rollout_logprobs_raw"} & {*dataset.column_names}
    assert_same([*from_dataset(dataset)], [*cache])


def test_weights_and_rewards_are_kept(tmp_path):
    """Where one sequence of a shard has them; the others get what their absence means."""
    records = [make_record(index) for index in range(5)]
    weights = np.linspace(0, 2, len(records[0][0].rollout_logprobs), dtype=np.float32)
    changed = {"weight": 0.1, "reward": -1.5, "token_weights": weights}
    records[0] = (dataclasses.replace(records[0][0], **changed), records[0][1])
    with CacheWriter.create(tmp_path / "cache", make_manifest(plan=(5,))) as writer:
        writer.write(0, records)
        writer.finish()
    cache = TeacherCache.open(tmp_path / "cache")
    dataset = to_dataset(cache)
    assert {*dataset.column_names} == {*COLUMNS} - SEVERAL
    items = [*from_dataset(dataset)]
    assert_same(items, [*cache])
    assert items[0].rollout.reward == -1.5 and items[1].rollout.reward is None
    np.testing.assert_array_equal(items[0].rollout.token_weights, weights)
    bad = dataset.remove_columns("weight").add_column("weight", [1.0, 0.0, 1.0, 1.0, 1.0])
    with pytest.raises(DataError, match=r"row 1: .*its weight is 0"):
        from_dataset(bad)[1]


def test_it_is_a_source_of_training(dataset):
    source = from_dataset(dataset)
    items = SequenceDataset(source)
    assert [r.prompt_id for r in source.rollouts()] == [f"prompt-{i}" for i in range(5)]
    together, apart = Collator()(items.__getitems__([3, 1])), Collator()([source[3], source[1]])
    for name, value in together.items():
        assert (value == apart[name]).all() if hasattr(value, "all") else value == apart[name]
    assert_same(source[-2:], [source[3], source[4]])


def test_lopd_import_reads_the_columns(dataset, tmp_path, teacher_folder, student_folder):
    """Without the three columns that it does not know: its tails are derived from the lists."""
    dataset.to_parquet(tmp_path / "scores.parquet")
    models = {"teacher": str(teacher_folder), "student": str(student_folder)}
    import_scores(
        ImportConfig(
            source=str(tmp_path / "scores.parquet"),
            format="topk",
            out=str(tmp_path / "cache"),
            codec="exact",
            **models,
        )
    )
    cache = TeacherCache.open(tmp_path / "cache")
    for imported, exact in zip(cache, from_dataset(dataset), strict=True):
        np.testing.assert_array_equal(imported.rollout.tokens, exact.rollout.tokens)
        np.testing.assert_array_equal(imported.rollout.loss_mask, exact.rollout.loss_mask)
        np.testing.assert_allclose(imported.teacher_logprobs, exact.teacher_logprobs)
        np.testing.assert_allclose(imported.tail_logprobs, exact.tail_logprobs, rtol=1e-4)


def test_optional_columns_have_defaults(dataset):
    item = from_dataset(dataset.select_columns([*REQUIRED]))[2]
    assert (item.rollout.prompt_id, item.rollout.sample) == ("2", 0)
    assert item.rollout.finish_reason == "stop" and item.rollout.loss_mask[3:].all()
    assert np.isnan(item.rollout.rollout_logprobs).all() and np.isnan(item.teacher_entropy).all()


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_column_is_named(dataset, name):
    with pytest.raises(DataError, match=f"no column '{name}'; found .*to_dataset writes it"):
        from_dataset(dataset.remove_columns(name))


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("prompt_token_ids", "text", "string"),
        ("response_token_ids", [1.5], "list<.*double>"),
        ("topk_ids", [1, 2], "list<.*int64>"),
        ("topk_logprobs", [["-1"]], "list<.*string>>"),
        ("teacher_logprobs", [1, 2], "list<.*int64>"),
        ("loss_mask", [0, 1], "list<.*int64>"),
        ("sample", "0", "string"),
    ],
)
def test_a_column_of_another_type_is_refused(dataset, name, value, found):
    changed = dataset.remove_columns(name).add_column(name, [value] * len(dataset))
    with pytest.raises(DataError, match=rf"column '{name}' is {found}; expected"):
        from_dataset(changed)


def change(name, edit):
    def changed(row):
        row[name] = edit(row[name])

    return changed


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            change("teacher_logprobs", lambda x: x[:-1]),
            "5 entries of 'teacher_logprobs'; expected 6",
        ),
        (change("loss_mask", lambda x: [*x, True]), "7 entries of 'loss_mask'; expected 6"),
        (change("topk_ids", lambda x: x[1:]), "5 entries of 'topk_ids'; expected 6"),
        (change("topk_ids", lambda x: [x[0][1:], *x[1:]]), "differ in length"),
        (change("topk_ids", lambda x: [[x[0][0]] * len(x[0]), *x[1:]]), "expected distinct ids"),
        (change("topk_ids", lambda x: [[-1, *x[0][1:]], *x[1:]]), "id -1 .* ids of at least 0"),
        (change("topk_logprobs", lambda x: [[1.0, *x[0][1:]], *x[1:]]), "log-probs of at most 0"),
        (change("topk_logprobs", lambda x: [[math.nan, *x[0][1:]], *x[1:]]), "log-prob nan"),
        (change("tail_logprobs", lambda x: [-0.1, *x[1:]]), "lacks a mass of list and tail of 1"),
        (change("teacher_logprobs", lambda x: [-30.0 * (v < -1) for v in x]), "lacks"),
        (change("response_token_ids", lambda x: []), "6 entries of 'loss_mask'; expected 0"),
        (change("prompt_token_ids", lambda x: []), "prompt_length is 0"),
        (change("finish_reason", lambda x: "eos"), "finish_reason is 'eos'"),
        (change("rollout_logprobs", lambda x: [math.nan, *x[1:]]), "rollout_logprobs .* is nan"),
        (change("tail_logprobs", lambda x: None), "column 'tail_logprobs' has an empty value"),
        (
            change("topk_logprobs", lambda x: [[None, *x[0][1:]], *x[1:]]),
            "'topk_logprobs' has an empty value",
        ),
    ],
)
def test_a_bad_row_is_refused_when_it_is_read(dataset, edit, message):
    rows = dataset.to_list()
    edit(rows[2])
    source = from_dataset(datasets.Dataset.from_list(rows, features=dataset.features))
    source.read([1, 4])
    with pytest.raises(DataError, match=rf"row 2: .*{message}"):
        source.read([1, 2, 3])


def test_other_things_than_a_dataset_are_refused(dataset):
    for thing in (dataset.to_iterable_dataset(), datasets.DatasetDict(train=dataset), [{}]):
        with pytest.raises(DataError, match="expected a datasets.Dataset with the columns"):
            from_dataset(thing)
    with pytest.raises(DataError, match="no rows"):
        from_dataset(dataset.select([]))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    cache = TeacherCache.open(cache_of(tmp_path / "cache"))
    with pytest.raises(ShardError, match="scores.arrow: cannot be written"):
        to_dataset(cache, tmp_path / "absent" / "scores.arrow")


def test_damage_in_the_cache_leaves_no_file(tmp_path):
    cache = TeacherCache.open(cache_of(tmp_path / "cache"))
    shard = tmp_path / "cache/shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(ShardError, match="shard-00002"):
        to_dataset(cache, tmp_path / "scores.arrow")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_a_calibrated_cache_is_refused(tmp_path):
    rollout, scores, _ = make_pair(0)
    none = {"topk_ids": np.zeros((6, 0), np.int32), "topk_logprobs": np.zeros((6, 0), np.float32)}
    scores = dataclasses.replace(scores, **none, tail_logprobs=np.zeros(6, np.float32))
    manifest = make_manifest(plan=(1,), k=0, scoring={"teacher_logprobs": "calibrated"})
    with CacheWriter.create(tmp_path, manifest) as writer:
        writer.write(0, [(rollout, scores)])
        writer.finish()
    with pytest.raises(ConfigError, match="calibrated, which a dataset cannot say"):
        to_dataset(TeacherCache.open(tmp_path))
