"""docs/formats.md names every array, every key of a receipt and every key of a manifest."""

import json
import re
from pathlib import Path

import pytest
from helpers_cache import make_manifest, write_cache
from safetensors import safe_open

from lopd.provenance import write_manifest
from lopd.provenance.folder_receipt import RECEIPT_NAME, seal
from lopd.provenance.manifest import KEYS
from lopd.store.arrays import GIVEN_ARRAYS

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([a-z_0-9.]+)`", PAGE))


@pytest.mark.parametrize("codec", ["exact", "packed", "compact"])
def test_every_array_and_key_on_disk_is_documented(codec, tmp_path):
    manifest = make_manifest(codec=codec)
    write_cache(tmp_path, manifest)
    with safe_open(tmp_path / "shard-00000.safetensors", "np") as shard:
        arrays = set(shard.keys())
        header = json.loads(shard.metadata()["lopd"])
    receipt = json.loads((tmp_path / "shard-00000.json").read_bytes())
    written = json.loads((tmp_path / "manifest.json").read_bytes())
    assert len(arrays) >= 14
    assert arrays - NAMED == set() == {*GIVEN_ARRAYS} - NAMED
    assert receipt.keys() - NAMED == set()
    assert header.keys() - NAMED == set()
    assert written.keys() - NAMED - {"plan"} == set()
    assert {*KEYS} - NAMED - {"plan"} == set()


def test_the_receipt_of_a_folder_is_documented(tmp_path):
    write_manifest(tmp_path, make_manifest("rollouts"))
    seal(tmp_path, ["manifest.json"], step=3, run="r")
    receipt = json.loads((tmp_path / RECEIPT_NAME).read_bytes())
    assert receipt.keys() - NAMED == set()
    assert receipt["files"]["manifest.json"].keys() - NAMED == set()
