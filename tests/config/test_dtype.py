"""The dtype `auto` is resolved before a manifest names it."""

from types import SimpleNamespace

import pytest
import torch

from lopd.config.dtype import with_dtype
from lopd.config.inference import InferenceOptions


def test_auto_is_float32_on_a_cpu_and_is_printed(capsys):
    assert with_dtype(InferenceOptions(device="cpu")).dtype == "float32"
    assert capsys.readouterr().err == "dtype: float32 (auto, on cpu)\n"


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")]
)
def test_auto_is_bfloat16_on_gpus_that_compute_it(monkeypatch, capability, expected):
    found = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    found.get_device_capability = lambda device: capability
    monkeypatch.setattr(torch, "cuda", found)
    assert with_dtype(InferenceOptions()).dtype == expected


def test_a_chosen_dtype_stays(capsys):
    config = InferenceOptions(dtype="bfloat16", device="cpu")
    assert with_dtype(config) is config
    assert not capsys.readouterr().err
