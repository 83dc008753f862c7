"""Imported lists that were renormalised: refused, or admitted for losses that need no more."""

import numpy as np
import pytest
from helpers_import import distill, rescore, run, topk_record, write
from helpers_stages import one_line

from lopd.cli import main
from lopd.errors import ConfigError
from lopd.provenance import read_manifest
from lopd.store import TeacherCache


def renormalised(dumped):
    records = []
    for item in dumped:
        record = topk_record(*item)
        for row in record["logprobs"]:
            total = np.log(sum(np.exp(list(row.values()))))
            for token in row:
                row[token] = float(row[token] - total)
        records.append(record)
    return records


def test_renormalised_lists_are_refused_and_admitted_only_for_renormalised_losses(
    student, teacher_folder, dumped, tmp_path, capsys
):
    source = write(tmp_path / "dump.jsonl", renormalised(dumped))
    cache = tmp_path / "cache"
    assert run(source, "topk", student, teacher_folder, cache) == 2
    assert "--allow-renormalized" in capsys.readouterr().err and not cache.exists()
    assert run(source, "topk", student, teacher_folder, cache, "--allow-renormalized") == 0
    assert read_manifest(cache).scoring.tail == "renormalized"
    only = ["--tail", "renormalize", "--support", "list"]
    policy_gradient = ["--objective", "policy_gradient"]
    for flags in ([], policy_gradient, ["--tail", "truncate", *only[2:]], only[:2], only[2:]):
        assert distill(student, cache, tmp_path / "no", *flags) == 2
        assert "mass outside them is lost" in capsys.readouterr().err
    assert distill(student, cache, tmp_path / "yes", *only) == 0
    assert rescore(student, teacher_folder, cache) == 2
    assert "nothing to compare with" in capsys.readouterr().err
    pytest.importorskip("datasets", reason="part of the extra `datasets`")
    from lopd.integrations.datasets import to_dataset

    with pytest.raises(ConfigError, match="which a dataset cannot say"):
        to_dataset(TeacherCache.open(cache))


def test_renormalised_lists_beside_log_probs_of_the_full_softmax_are_named_so(
    student, teacher_folder, dumped, tmp_path, capsys
):
    records = renormalised(dumped)
    for record, item in zip(records, dumped, strict=True):
        lists = topk_record(*item)["logprobs"]
        own = zip(lists, record["response_token_ids"], strict=True)
        record["teacher_logprobs"] = [row[token] for row, token in own]
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 2
    assert "the list has mass 1, as if it was renormalised" in capsys.readouterr().err


@pytest.mark.parametrize("column", [True, False], ids=["with log-probs", "without"])
def test_a_token_outside_its_renormalised_list_has_no_log_prob(
    student, teacher_folder, dumped, tmp_path, capsys, column
):
    """The lists alone are used; a log-prob of the full softmax beside them contradicts them."""
    records, count = renormalised(dumped), 0
    for record, item in zip(records, dumped, strict=True):
        raw = topk_record(*item)["logprobs"]
        own = [*zip(raw, record["response_token_ids"], strict=True)]
        if column:
            record["teacher_logprobs"] = [row[token] for row, token in own]
        for t in range(0, len(own), 2):
            mass = 1 - np.exp(record["logprobs"][t].pop(own[t][1]))
            for other in record["logprobs"][t]:
                record["logprobs"][t][other] -= float(np.log(mass))
            count += 1
    source, cache = write(tmp_path / "dump.jsonl", records), tmp_path / "cache"
    assert run(source, "topk", student, teacher_folder, cache) == 2
    error = one_line(capsys)
    assert "the list has mass 1, as if it was renormalised" in error
    assert "pass --allow-renormalized" in error
    assert run(source, "topk", student, teacher_folder, cache, "--allow-renormalized") == 0
    assert f"{count} sampled tokens are outside their renormalised lists" in capsys.readouterr().err
    assert read_manifest(cache).inputs["source"]["unlisted"] == count
    for item, record in zip(TeacherCache.open(cache, support="list"), records, strict=True):
        for t, row in enumerate(record["logprobs"]):
            token = record["response_token_ids"][t]
            expected = row.get(token, np.log(2.0**-23))
            assert item.teacher_logprobs[t] == pytest.approx(expected, abs=1e-5)
            listed = item.topk_ids[t] >= 0
            found = dict(zip(item.topk_ids[t][listed], item.topk_logprobs[t][listed], strict=True))
            assert found == pytest.approx(row, abs=1e-5)
    only = ["--tail", "renormalize", "--support", "list"]
    assert distill(student, cache, tmp_path / "out", *only) == 0
    capsys.readouterr()
    assert (
        distill(student, cache, tmp_path / "no", *only, "--token-weights", "divergence_rank") == 2
    )
    assert "has those of renormalised lists only; use prefix" in one_line(capsys)
    assert main(["inspect", "--path", str(cache)]) == 0
    assert "log_ratio" not in capsys.readouterr().out
    assert main(["verify", "--path", str(cache)]) == 0


def test_raw_lists_are_checked_as_such_though_renormalised_ones_are_allowed(
    student, teacher_folder, dumped, tmp_path, capsys
):
    records = renormalised(dumped)
    records[-1]["logprobs"][-1] = topk_record(*dumped[-1])["logprobs"][-1]
    del records[0]["logprobs"][0][records[0]["response_token_ids"][0]]
    mass = sum(np.exp([*records[0]["logprobs"][0].values()]))
    for token in records[0]["logprobs"][0]:
        records[0]["logprobs"][0][token] -= float(np.log(mass))
    source = write(tmp_path / "dump.jsonl", records)
    flag = "--allow-renormalized"
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache", flag) == 2
    assert "is not in its list" in one_line(capsys)


def test_rounded_renormalised_lists_are_detected(student, teacher_folder, dumped, tmp_path, capsys):
    records = renormalised(dumped)
    for record in records:
        record["logprobs"] = [
            {i: round(p, 3) for i, p in row.items()} for row in record["logprobs"]
        ]
    masses = [sum(np.exp(list(row.values()))) for r in records for row in r["logprobs"]]
    assert max(abs(mass - 1) for mass in masses) > 1e-4
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 2
    assert "the lists were renormalised" in capsys.readouterr().err


def test_one_list_with_a_tail_is_enough_to_keep_the_others(
    student, teacher_folder, dumped, tmp_path
):
    records = renormalised(dumped)
    records[-1]["logprobs"][-1] = topk_record(*dumped[-1])["logprobs"][-1]
    source = write(tmp_path / "dump.jsonl", records)
    assert run(source, "topk", student, teacher_folder, tmp_path / "cache") == 0
    assert read_manifest(tmp_path / "cache").scoring.tail == "derived"
