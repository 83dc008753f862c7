"""What a power cut would leave of a run: no receipt and no manifest without what it stands for."""

import pytest
from helpers_disk import Disk
from helpers_stages import COMMON, write_prompts

from lopd.cli import main

TRAIN = ["--max-steps", "2", "--batch-size", "2", "--save-every", "1"]
SHORT = ["--max-new-tokens", "4", *COMMON]


@pytest.mark.thorough
def test_every_stage_syncs_before_it_names(teacher_folder, student_folder, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path / "prompts.jsonl", 4, answer="a")
    out = tmp_path / "runs"
    disk = Disk(out, monkeypatch)
    sampled = ["--prompts", str(prompts), *SHORT]
    commands = {
        "sft-data": ["--teacher", str(teacher_folder), *sampled],
        "sft": ["--model", str(student_folder), "--data", str(out / "sft-data"), *TRAIN, *COMMON],
        "rollout": ["--student", str(out / "sft"), *sampled],
        "score": ["--teacher", str(teacher_folder), "--rollouts", str(out / "rollout"), *COMMON],
        "distill": ["--student", str(out / "sft"), "--cache", str(out / "score"), *TRAIN, *COMMON],
        "eval": ["--model", str(out / "distill"), "--num-samples", "1", *sampled],
    }
    for stage, flags in commands.items():
        assert main([stage, *flags, "--out", str(out / stage)]) == 0
        assert not disk.faults, (stage, disk.faults)
    disk.check_everything()
    assert not disk.faults, disk.faults
