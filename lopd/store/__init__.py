"""On-disk sequences: a teacher's answers, a student's rollouts, and the teacher's scores.

All three share one format. A folder holds `manifest.json` (the recipe and the number of sequences
of each shard, written once), `shard-00000.safetensors` (flat arrays, ragged by offsets) and
`shard-00000.json` (its receipt: counts, bytes, sha256, recipe digest). A shard is finished when
its receipt exists and matches; a resumed stage writes the missing shards.

Writers:  `RolloutWriter`, `CacheWriter`; several processes write one folder as `Worker`s.
Readers:  `RolloutStore` returns `Rollout`, `TeacherCache` returns `TeacherSequence`.
Scores:   an engine returns `TeacherScores`; `scored_sequence` turns them into a `TeacherSequence`
          without a store. Lists are ragged (`TopKLists`) until a collator pads them into a batch.
"""

from lopd.store.codec import CODECS
from lopd.store.ragged import TopKLists
from lopd.store.reader import RolloutStore, TeacherCache
from lopd.store.sequences import scored_sequence
from lopd.store.types import FINISH_REASONS, Rollout, TeacherScores, TeacherSequence
from lopd.store.writer import CacheWriter, RolloutWriter

__all__ = [
    "CODECS",
    "FINISH_REASONS",
    "CacheWriter",
    "Rollout",
    "RolloutStore",
    "RolloutWriter",
    "TeacherCache",
    "TeacherScores",
    "TeacherSequence",
    "TopKLists",
    "scored_sequence",
]
