"""`lopd doctor`: what it finds, what a missing thing costs, and how to mend it."""

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from lopd.cli import main
from lopd.stages import doctor


def report(capsys, *flags):
    assert main(["doctor", *flags]) == 0
    return capsys.readouterr().out


def test_the_table_names_every_package_with_its_version(capsys):
    out = report(capsys)
    lines = dict(line.split(maxsplit=1) for line in out.split("\n\n")[0].splitlines())
    assert lines["torch"].strip() == importlib.metadata.version("torch")
    assert set(doctor.PACKAGES) <= set(lines)
    assert all(len(line) <= 80 for line in out.splitlines())


def test_json_has_the_same_findings(capsys):
    findings = json.loads(report(capsys, "--json"))
    found = {finding["item"]: finding["found"] for finding in findings}
    assert found["transformers"] == importlib.metadata.version("transformers")
    assert all(bool(f["cost"]) == bool(f["remedy"]) for f in findings)


def test_a_missing_package_has_a_cost_and_a_command(capsys, monkeypatch):
    known = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    out = report(capsys)
    assert 'peft: no --lora-rank\n  pip install "lopd[peft]"' in out


def test_a_torch_that_cannot_be_imported_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    out = report(capsys)
    assert "gpu: torch cannot be imported:" in out and "pip install torch" in out


@pytest.mark.parametrize(("major", "cost"), [(9, ""), (7, "it computes bfloat16 slowly")])
def test_gpus_are_listed(monkeypatch, major, cost):
    properties = SimpleNamespace(name="GPU", total_memory=80 << 30, major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    driver, *gpus = doctor.devices()
    assert driver.found.startswith("unknown (")  # there is no nvidia-smi, or it finds no device
    assert [gpu.item for gpu in gpus] == ["gpu 0", "gpu 1"]
    assert f"GPU, 80.0 GiB, compute capability {major}.0" == gpus[0].found
    assert gpus[0].cost == cost


def test_too_little_of_something_is_reported():
    assert doctor.few(10, 20, "cost", "remedy") == ("cost", "remedy")
    assert doctor.few(20, 20, "cost", "remedy") == ("", "")
