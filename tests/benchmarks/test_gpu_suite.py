"""The GPU suite at toy size on a CPU: parts, rows, exit codes, criteria."""

import json
import shlex
from dataclasses import asdict

import pytest
import torch

from benchmarks import correctness, criteria, figures, gpu_suite, harness, projects, variants
from benchmarks.harness import Variant
from benchmarks.problems import REVERSE_KL
from benchmarks.recorder import Recorder, describe
from benchmarks.roofline import TARGET

TOY = ["--quick", "--device", "cpu"]
ALWAYS = {
    "part", "variant", "status", "command", "date", "device", "driver", "threads", "python",
    "torch", "cuda", "triton", "liger-kernel", "cut-cross-entropy", "commit", "dirty",
}  # fmt: skip
MEASURED = {
    "kind", "loss", "logits", "note", "setting", "gemms", "rows", "hidden", "vocab", "topk",
    "dtype", "regime",
}  # fmt: skip
TIMED = {"median_ms", "p10_ms", "p90_ms", "repetitions", "tokens_per_s", "floor_ratio"}
MEMORY = {"peak_mib", "extra_mib", "dhidden_mib", "dweight_mib", "reserved_mib"}
GRADED = {"fused_loss", "memory_curve", "shapes"}
# The parts left out train models of other sizes only.
RUN = [*gpu_suite.DEFAULT, "shapes", "one_pass"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("suite")
    code = gpu_suite.main(["--out", str(out), *TOY, "--only", *RUN])
    return code, out, criteria.read([out / "rows.jsonl"])


def test_every_part_runs(run):
    code, _, rows = run
    parts = {row["variant"]: row for row in rows if row["part"] == "suite"}
    assert code == 0
    assert {name: row["status"] for name, row in parts.items()} == dict.fromkeys(RUN, "ok")
    assert all(row["seconds"] > 0 and row["planned_s"] > 0 for row in parts.values())
    for name in RUN:
        assert any(row["part"] == name and row["status"] == "ok" for row in rows), name


def test_the_default_plan_fits_the_time_limit():
    args = gpu_suite.parse(["--out", "out", *TOY])
    assert args.only == [name for name in gpu_suite.PARTS if name not in gpu_suite.ON_REQUEST]
    assert args.only[:2] == ["environment", "correctness"]
    planned = sum(gpu_suite.PARTS[name][0] for name in args.only)
    assert planned <= args.time_limit == gpu_suite.TIME_LIMIT_S


def test_rows_are_self_contained(run):
    for row in run[2]:
        assert set(row) >= ALWAYS
        if row["part"] in GRADED:
            assert set(row) >= MEASURED
            if row["status"] == "ok":
                assert set(row) >= TIMED
                assert row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
            if row["status"] == "ok" and row["kind"] in harness.GATED:
                assert {"dhidden_error", "dweight_error", "loss_error"} | MEMORY <= set(row)
                assert row["extra_mib"] is None  # only a GPU's allocator counts


def test_the_command_of_a_row_runs_its_part(run):
    for command in {row["command"] for row in run[2] if row["part"] != "suite"}:
        head, flags = command.split(" --", 1)
        assert head == "python -m benchmarks.gpu_suite"
        args = gpu_suite.parse(shlex.split("--" + flags))
        assert len(args.only) == 1 and args.quick


def test_rows_of_competitors_and_missing_peers(run):
    status = {row["variant"]: row for row in run[2] if row["part"] == "fused_loss"}
    for name in ("Liger cross-entropy, C=8", "Liger fused linear JSD", "Cut Cross-Entropy"):
        assert status[name]["status"] == "unavailable"
        assert "is not installed" in status[name]["reason"] or "CUDA" in status[name]["reason"]
        assert status[name]["note"].startswith("nearest primitive")
    assert status["eager, bf16 logits"]["dweight_error"] > status["ours"]["dweight_error"]
    assert len(status["ours"]["student_tail"]) == 3


def test_scoring_reports_throughput_and_memory(run):
    rows = [row for row in run[2] if row["part"] == "scoring"]
    scorers = [row for row in rows if row["kind"] in harness.GATED]
    assert {row["variant"].split(",")[0] for row in scorers} == {
        "linear_topk", "full logits", "1024-row chunks",
    }  # fmt: skip
    for row in scorers:
        assert {"logprob_error", "tail_error"} | MEMORY <= set(row) and row["gemms"] == 1
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["rows"] / row["median_ms"])
        assert f"{row['tokens_per_s']:.3g} tokens/s" in describe(row)


def test_a_small_workspace_gives_a_refused_row(run):
    curve = [row for row in run[2] if row["part"] == "memory_curve"]
    assert {row["status"] for row in curve} == {"ok", "refused"}


def test_every_public_loss_is_checked(run):
    rows = [row for row in run[2] if row["part"] == "correctness" and "dtype" in row]
    assert {row["dtype"] for row in rows} == {"bfloat16", "float16", "float32"}
    functions = {row["variant"].split(":")[0] for row in rows}
    import lopd_kernels

    assert functions == {name for name in lopd_kernels.__all__ if name.islower()}
    assert all(row["status"] == "ok" and row["repetitions"] == 2 for row in rows)


def test_figures_and_summary(run):
    _, out, _ = run
    made = {path.name for path in out.glob("*.png")}
    assert made == {"times.png", "gradient_error.png", "shapes.png"}  # no memory on a CPU
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in made)
    summary = (out / "summary.md").read_text()
    assert summary.count("not measured") == len(criteria.evaluate([])) + 1
    assert "Wrong: 0." in summary and "Incomplete parts: 0." in summary


def wrong_competitors():
    zero = variants.ours("zero").prepare

    def prepare(problem):
        step = zero(problem).step
        return harness.Prepared(lambda: step()._replace(dweight=torch.zeros_like(problem.weight)))

    wrong = Variant("zero", "ours", REVERSE_KL, prepare)
    return [*variants.floors("three"), variants.ours("ours"), wrong]


def test_a_red_gate_fails_the_run_and_has_no_speed(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "competitors", wrong_competitors)
    assert gpu_suite.main(["--out", str(tmp_path), *TOY, "--only", "fused_loss"]) == 1
    by_name = {row["variant"]: row for row in criteria.read([tmp_path / "rows.jsonl"])}
    assert by_name["zero"]["status"] == "red gate" and "median_ms" not in by_name["zero"]
    assert by_name["ours"]["median_ms"] > 0
    assert "fused_loss: zero: red gate" in (tmp_path / "summary.md").read_text()


def test_a_wrong_public_loss_fails_the_run(tmp_path, monkeypatch):
    import lopd_kernels

    right = lopd_kernels.linear_cross_entropy
    monkeypatch.setattr(lopd_kernels, "linear_cross_entropy", lambda *a, **k: 1.01 * right(*a, **k))
    top = lopd_kernels.linear_topk

    def shifted(*args, **kwargs):
        result = top(*args, **kwargs)
        return result._replace(tail_logprobs=result.tail_logprobs + 1e-3)

    monkeypatch.setattr(lopd_kernels, "linear_topk", shifted)
    assert gpu_suite.main(["--out", str(tmp_path), *TOY, "--only", "correctness"]) == 1
    rows = criteria.read([tmp_path / "rows.jsonl"])
    red = {row["variant"].split(":")[0] for row in rows if row["status"] == "red gate"}
    assert red == {"linear_cross_entropy", "linear_topk"}


def test_runs_that_are_not_bitwise_equal_are_red(monkeypatch, tmp_path):
    import lopd_kernels

    right, calls = lopd_kernels.linear_topk, []

    def unsteady(*args, **kwargs):
        calls.append(1)
        result = right(*args, **kwargs)
        return result._replace(entropy=result.entropy * (1.0 + 2e-7 * (len(calls) % 2)))

    monkeypatch.setattr(lopd_kernels, "linear_topk", unsteady)
    recorder = Recorder(tmp_path / "rows.jsonl", torch.device("cpu"), "")
    correctness.run_api(recorder, quick=True)
    reasons = {row["variant"]: row["reason"] for row in recorder.rows if row["reason"]}
    assert set(reasons.values()) == {"2 runs differ in their bits"}
    assert {name.split(":")[0] for name in reasons} == {"linear_topk"} and len(reasons) == 3


def test_a_part_that_crashes_fails_the_run(tmp_path, monkeypatch, capsys):
    def crash(suite):
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(gpu_suite.PARTS, "ablation", (1, crash))
    assert gpu_suite.main(["--out", str(tmp_path), *TOY, "--only", "ablation"]) == 1
    assert "ZeroDivisionError: oh" in (tmp_path / "summary.md").read_text()


def test_after_the_time_limit_parts_are_skipped(tmp_path):
    assert gpu_suite.main(["--out", str(tmp_path), *TOY, "--time-limit", "-1"]) == 0
    rows = criteria.read([tmp_path / "rows.jsonl"])
    assert [row["variant"] for row in rows] == gpu_suite.DEFAULT
    assert {row["status"] for row in rows} == {"skipped"}
    assert f"Incomplete parts: {len(rows)}." in (tmp_path / "summary.md").read_text()


def test_a_part_that_is_cut_off_keeps_its_rows(tmp_path):
    recorder = Recorder(tmp_path / "rows.jsonl", torch.device("cpu"), "")
    suite = gpu_suite.Suite(recorder, True, tmp_path / "log")

    def times_out(problem):
        recorder.deadline = 0.0
        return "gone"

    first = variants.peer("first", "a", projects.eager, missing=times_out)
    part = (1, lambda suite: suite.measure("x", suite.problem(), [first, variants.ours("ours")]))
    gpu_suite.PARTS["x"] = part
    try:
        gpu_suite.run_part(suite, "x")
    finally:
        del gpu_suite.PARTS["x"]
    assert [(row["variant"], row["status"]) for row in recorder.rows] == [
        ("first", "unavailable"),
        ("x", "cut off"),
    ]


@pytest.mark.parametrize("flags", [["--device", "cpu"], ["--only", "nothing"]])
def test_bad_arguments(flags, tmp_path):
    with pytest.raises(SystemExit):
        gpu_suite.parse(["--out", str(tmp_path), *flags])


@pytest.mark.parametrize(
    ("body", "status", "tests"),
    [
        ("def test_a(): pass", "ok", {"passed": 1}),
        ("def test_a(): pass\ndef test_b(): assert 0", "failed", {"passed": 1, "failed": 1}),
        ("", "no tests", {}),
        ("import time\ndef test_a(): time.sleep(3600)", "cut off", {}),
    ],
)
def test_pytest_runs_in_a_subprocess(body, status, tests, tmp_path):
    (tmp_path / "test_it.py").write_text(body)
    recorder = Recorder(tmp_path / "rows.jsonl", torch.device("cpu"), "")
    arguments = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    limit = 1.5 if status == "cut off" else 3600.0
    correctness.run_tests(recorder, tmp_path / "log", arguments, limit)
    (row,) = recorder.rows
    assert (row["status"], row["tests"]) == (status, tests)
    assert harness.is_red(row) == (status == "failed")
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row


def test_the_suite_runs_the_gpu_tests_of_every_folder():
    marker, expression, *paths = correctness.gpu_tests()
    assert (marker, expression) == ("-m", "gpu and not slow")
    assert {"tests/kernels", "tests/training"} <= {path.rsplit("/", 1)[0] for path in paths}
    assert all((correctness.ROOT / path).is_file() for path in paths)


def target_row(part, variant, kind, ms, extra=None, **fields):
    return {
        "part": part, "variant": variant, "kind": kind, "status": "ok", "loss": REVERSE_KL,
        "setting": "full", "median_ms": ms, "floor_ratio": ms and ms / 40.0, "extra_mib": extra,
        **asdict(TARGET),
        "logits": "fp32", "regime": "near", "tflops": 1.0, **fields,
    }  # fmt: skip


def all_met():
    error = {"dhidden_error": 2e-3, "dweight_error": 2e-3}
    tenfold = {"dhidden_error": 3e-2, "dweight_error": 2.1e-2}
    return [
        target_row("fused_loss", "three GEMMs", "floor", 40.0),
        target_row("fused_loss", "ours", "ours", 44.0, 4000.0),
        target_row("fused_loss", "ours, frozen weight", "ours", 45.0, 1200.0, setting="frozen"),
        target_row("memory_curve", "ours, buffer", "ours", 46.0, 1300.0, setting="buffer"),
        target_row("memory_curve", "ours, 2 GiB", "ours", 47.0, 2048.0),
        target_row("memory_curve", "ours, 250 MiB", "ours", 58.0, 250.0),
        target_row("fused_loss", "eager, bf16 logits", "peer", 100.0, 30000.0),
        target_row("fused_loss", "torch.compile, bf16 logits", "peer", 80.0, 20000.0),
        target_row("fused_loss", "Liger cross-entropy, C=8", "peer", 45.0, 2000.0, loss="x"),
        target_row("skipping", "ours, dense_share=0.15", "ours", 23.0, 4000.0, loss="sampled"),
        target_row("accuracy", "ours", "ours", None, **error),
        target_row("accuracy", "eager, bf16 logits", "peer", None, **tenfold, logits="bf16"),
        target_row(
            "accuracy", "eager, bf16 logits", "peer", None, **error, logits="bf16", regime="far"
        ),
        target_row("row_kernel", "row kernel", "ours", 1.0, rows=2048, tb_per_s=3.5),
        target_row("row_kernel", "copy", "piece", 1.0, rows=2048, tb_per_s=4.2),
        {
            "part": "training_8B",
            "variant": "planned peak",
            "status": "ok",
            "kind": "ours",
            "model": "Qwen3-8B shape",
            "difference": -0.09,
        },
        {"part": "environment", "variant": "GEMM ceiling", "status": "ok", "tflops": 790.0},
        {"part": "environment", "variant": "copy ceiling", "status": "ok", "tb_per_s": 4.2},
    ]


def test_criteria_can_be_met():
    rows = [{"median_ms": None, "tb_per_s": None, **row} for row in all_met()]
    assert {each.verdict for each in criteria.evaluate(rows)} == {"met"}
    assert "790 TFLOP/s" in criteria.table(rows) and "44.0 ms" in criteria.table(rows)


@pytest.mark.parametrize(
    ("variant", "changes", "missed"),
    [
        ("ours", {"median_ms": 45.5, "floor_ratio": 1.13}, ["fastest", "Liger"]),
        ("eager, bf16 logits", {"median_ms": 43.0}, ["eager"]),
        ("torch.compile, bf16 logits", {"median_ms": 44.0}, ["torch.compile"]),
        ("Liger cross-entropy, C=8", {"median_ms": 43.0}, ["Liger"]),
        ("ours, frozen weight", {"extra_mib": 1340.0}, ["frozen"]),
        ("ours, frozen weight", {"floor_ratio": 1.26}, ["frozen"]),
        ("ours, buffer", {"floor_ratio": 1.26}, ["buffer"]),
        ("ours, 2 GiB", {"extra_mib": 2600.0}, ["otherwise"]),
        ("ours, 250 MiB", {"extra_mib": 257.0}, ["256 MiB"]),
        ("ours, 250 MiB", {"floor_ratio": 1.51}, ["256 MiB"]),
        ("ours, dense_share=0.15", {"floor_ratio": 0.61}, ["dense_share"]),
        ("eager, bf16 logits", {"dweight_error": 1.9e-2}, ["gradient error"]),
        ("row kernel", {"tb_per_s": 3.3}, ["row kernel"]),
        ("planned peak", {"difference": 0.11}, ["lopd plan"]),
        ("planned peak", {"difference": -0.11}, ["lopd plan"]),
    ],
)
def test_each_criterion_can_be_missed(variant, changes, missed):
    rows = [
        {**row, **changes} if row["variant"] == variant and set(changes) & set(row) else row
        for row in all_met()
    ]
    rows = [row for row in rows if not (row["part"] == "accuracy" and "median_ms" in changes)]
    names = [each.name for each in criteria.evaluate(rows) if each.verdict == "missed"]
    assert len(names) == len(missed)
    assert all(part in name for part, name in zip(missed, names, strict=True))


def test_toy_rows_do_not_count_as_measured(run):
    assert {each.verdict for each in criteria.evaluate(run[2])} == {"not measured"}


def test_the_time_memory_figure(tmp_path):
    rows = [{**row, "dtype": "bfloat16", "device": "none"} for row in all_met()]
    rows = [row for row in rows if row["part"] in ("fused_loss", "memory_curve")]
    for row in rows:
        row |= {"p10_ms": row["median_ms"], "p90_ms": row["median_ms"], "gemms": 3}
    assert {path.name for path in figures.draw(rows, tmp_path)} == {"time_memory.png", "times.png"}
    assert figures.draw([], tmp_path) == []
