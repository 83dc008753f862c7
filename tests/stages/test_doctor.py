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
    driver, compiler, *gpus = doctor.devices()
    assert bool(compiler.cost) == (compiler.found == "none")
    assert driver.found.startswith("unknown (")  # there is no nvidia-smi, or it finds no device
    assert [gpu.item for gpu in gpus] == ["gpu 0", "gpu 1"]
    assert f"GPU, 80.0 GiB, compute capability {major}.0" == gpus[0].found
    assert gpus[0].cost == cost


def test_too_little_of_something_is_reported():
    assert doctor.few(10, 20, "cost", "remedy") == ("cost", "remedy")
    assert doctor.few(20, 20, "cost", "remedy") == ("", "")


@pytest.mark.parametrize(
    ("built", "version", "cost", "remedy"),
    [
        (None, None, "everything runs on the CPU", "use a machine with a GPU"),
        ("13.0", None, "everything runs on the CPU", "use a machine with a GPU"),
        (None, "580.1", "torch cannot use the GPU of driver 580.1", "install a torch"),
        ("13.0", "580.1", "torch cannot use the GPU of driver 580.1", "torch.cuda.init()"),
    ],
)
def test_without_a_gpu_it_says_whether_torch_or_the_machine_lacks_it(
    monkeypatch, built, version, cost, remedy
):
    monkeypatch.setattr(doctor, "driver", lambda: version)
    found = doctor.no_gpu(built)
    assert found.cost.startswith(cost) and remedy in found.remedy
    assert ("CPUs" in found.found) == (built is None)


def test_the_driver_is_what_nvidia_smi_says(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.65.06\necho 580.65.06\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.driver() == "580.65.06"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert doctor.driver() is None


def test_what_only_a_gpu_needs_is_not_missing_without_one(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    costs = {finding.item: finding.cost for finding in doctor.packages(has_gpu=False)}
    assert not costs["triton"] and not costs["flash-attn"] and costs["peft"]
    assert all(finding.cost for finding in doctor.packages(has_gpu=True))


def test_a_version_that_lopd_does_not_work_with_is_named(monkeypatch):
    known = importlib.metadata.version

    def version(name):
        return "4.57.1" if name == "transformers" else known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.item: finding for finding in doctor.packages(has_gpu=False)}["transformers"]
    assert found.found == "4.57.1" and found.cost.startswith("lopd expects ")
    assert "pip install 'transformers" in found.remedy and ">=5" in found.remedy
    assert doctor.unmet("transformers", known("transformers")) is None
    assert doctor.unmet("torch", "2.13.0+cpu") is None
    assert doctor.unmet("flash-attn", "1.0") is None  # no requirement names it
