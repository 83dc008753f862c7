"""Evaluation of models and caches: accuracy, grading, KL to a teacher, noise floor."""
