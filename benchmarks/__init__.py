"""Benchmarks: one file per question, raw rows under results/."""
