"""The predicted size of a cache against its actual size."""

import pytest
from helpers_cache import files_of, make_manifest, make_pair, write_cache, write_rollouts

from lopd.errors import ConfigError
from lopd.store import RolloutStore
from lopd.store.size import (
    Work,
    check_fits,
    format_bytes,
    format_seconds,
    free_bytes,
    measure_size,
    sample,
    size_bounds,
    time_sample,
    work_left,
)

PLAN = (10, 10, 5)


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts")
    write_rollouts(folder, make_manifest("rollouts", plan=PLAN), length=40)
    return RolloutStore.open(folder)


@pytest.mark.parametrize("codec", ["exact", "packed"])
def test_the_predicted_size_is_that_of_the_cache(rollouts, tmp_path, codec):
    manifest = make_manifest(plan=PLAN, codec=codec, top_p=0.8)
    write_cache(tmp_path, manifest, length=40)
    size = measure_size(manifest, [make_pair(i, length=40)[:2] for i in range(8)])
    work = work_left(rollouts, PLAN)
    real = sum(map(len, files_of(tmp_path).values()))
    assert size.of(work) == pytest.approx(real, rel=0.05)
    low, high = size_bounds(manifest, sample(rollouts))
    assert low.of(work) < real < high.of(work)


def test_lists_that_are_never_cut_have_one_size(rollouts):
    low, high = size_bounds(make_manifest(plan=PLAN), sample(rollouts))
    assert low == high


def test_bounds_exist_for_lists_as_long_as_the_vocabulary(rollouts):
    size_bounds(make_manifest(plan=PLAN, k=40, top_p=0.9), sample(rollouts))


def test_work_is_what_is_missing(rollouts):
    work = work_left(rollouts, [10, 5])
    assert (work.shards, work.sequences) == (2, 15)
    assert work.response_tokens == 15 * 40 and work.tokens == 15 * 43
    assert work_left(rollouts, []) == Work(0, 0, 0, 0)


def test_a_sample_spans_the_store(rollouts):
    assert [s.prompt_id for s in sample(rollouts, 3)] == ["prompt-0", "prompt-12", "prompt-24"]
    assert len(sample(rollouts, 100)) == 25


def test_a_sample_is_timed_after_a_warm_up(rollouts):
    calls = []

    def score(sequences):
        calls.append(len(sequences))
        return [make_pair(int(s.prompt_id.split("-")[1]), length=40)[1] for s in sequences]

    timed = time_sample(make_manifest(plan=PLAN), sample(rollouts, 4), score)
    assert calls == [1, 4]
    assert (timed.sequences, timed.tokens) == (4, 4 * 43)
    work = work_left(rollouts, PLAN)
    assert timed.seconds_for(work) == pytest.approx(timed.seconds * 25 / 4)


def test_a_disk_without_room_is_refused(tmp_path):
    out = tmp_path / "not" / "yet"
    free = free_bytes(out)
    assert free > 0
    check_fits(out, free // 2, "as measured")
    with pytest.raises(ConfigError, match=r"needs .* \(as measured\), the disk has .* free"):
        check_fits(out, 2 * free, "as measured")


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1234, "1.23 kB"), (5e9, "5 GB"), (2.5e15, "2.5e+03 TB")]
)
def test_bytes_in_words(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.51, "0.5 s"), (119, "119.0 s"), (600, "10 min"), (9000, "2.5 h")]
)
def test_seconds_in_words(seconds, text):
    assert format_seconds(seconds) == text
