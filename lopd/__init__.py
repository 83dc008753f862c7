"""lopd: offline on-policy distillation of language models.

The stages (`sft_data`, `sft`, `rollout`, `score`, `distill`, `evaluate`) each have a
config dataclass and a `main`; `lopd --help` lists them as commands. The losses live in
`lopd_kernels`, which stands alone.
"""

__version__ = "0.1.0"
