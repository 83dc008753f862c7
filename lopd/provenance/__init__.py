"""Provenance: what made an artefact, and whether artefacts belong together.

Every artefact folder (`sft_data`, `checkpoint`, `rollouts`, `cache`, `evaluation`) has a
`manifest.json` with the content fingerprints of the models and inputs that made it, read as a
`Manifest`. `check_distill` compares them before a model is built. Nothing here builds a model.
"""

from lopd.provenance.behaviour import behaviour_of, chat_template_digest
from lopd.provenance.fingerprint import (
    VOCAB_FILES,
    config_digest,
    describe_file,
    describe_model,
    fingerprint_weights,
    forget_fingerprints,
    load_vocab,
    save_vocab,
    tokenizer_digest,
    vocab_file,
)
from lopd.provenance.folder import eos_ids_of, vocab_size_of
from lopd.provenance.gate import check_distill, differing_token
from lopd.provenance.identity import (
    difference,
    digests_of,
    manifest_digest,
    recipe_of,
    settings_identity,
)
from lopd.provenance.lineage import declare, lineage_of, warn_if_edited
from lopd.provenance.manifest import (
    MANIFEST_NAME,
    CacheManifest,
    Manifest,
    ModelIdentity,
    build_manifest,
    read_manifest,
    write_manifest,
)

__all__ = [
    "MANIFEST_NAME",
    "VOCAB_FILES",
    "CacheManifest",
    "Manifest",
    "ModelIdentity",
    "behaviour_of",
    "build_manifest",
    "chat_template_digest",
    "check_distill",
    "config_digest",
    "declare",
    "describe_file",
    "describe_model",
    "difference",
    "differing_token",
    "digests_of",
    "eos_ids_of",
    "fingerprint_weights",
    "forget_fingerprints",
    "lineage_of",
    "load_vocab",
    "manifest_digest",
    "read_manifest",
    "recipe_of",
    "save_vocab",
    "settings_identity",
    "tokenizer_digest",
    "vocab_file",
    "vocab_size_of",
    "warn_if_edited",
    "write_manifest",
]
