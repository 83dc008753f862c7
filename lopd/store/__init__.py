"""On-disk sequences: a teacher's answers, a student's rollouts, and the teacher's scores.

One mechanism for all three. A folder holds `manifest.json` (recipe and shard plan, written
once), `shard-00000.safetensors` (flat arrays, ragged by offsets) and `shard-00000.json`
(receipt: counts, bytes, sha256, recipe digest). A shard is finished when its receipt is
there and matches; resuming writes what is missing.
"""

from lopd.store.codec import CODECS, Codec
from lopd.store.reader import RolloutStore, TeacherCache
from lopd.store.sequences import SUPPORTS, scored_sequence
from lopd.store.types import Rollout, TeacherScores, TeacherSequence
from lopd.store.writer import CacheWriter, RolloutWriter

__all__ = [
    "CODECS",
    "SUPPORTS",
    "CacheWriter",
    "Codec",
    "Rollout",
    "RolloutStore",
    "RolloutWriter",
    "TeacherCache",
    "TeacherScores",
    "TeacherSequence",
    "scored_sequence",
]
