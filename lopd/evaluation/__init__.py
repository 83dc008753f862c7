"""Measures of a trained model: accuracy, grading, KL, noise floor."""
