"""On-disk sequences: a teacher's answers, a student's rollouts, and the teacher's scores.

One mechanism for all three. A folder holds `manifest.json` (recipe and shard plan, written
once), `shard-00000.safetensors` (flat arrays, ragged by offsets) and `shard-00000.json`
(receipt: counts, bytes, sha256, recipe digest). A shard is finished when its receipt is
there and matches; resuming writes what is missing.
"""

from lopd.cache.codec import CODECS, Codec
from lopd.cache.reader import RolloutStore, TeacherCache
from lopd.cache.records import Rollout, TeacherScores, TeacherSequence
from lopd.cache.sequences import SUPPORTS, scored_sequence
from lopd.cache.shards import scoring_of
from lopd.cache.writer import CacheWriter, RolloutWriter

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
    "scoring_of",
]
