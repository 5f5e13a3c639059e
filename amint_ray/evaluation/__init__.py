"""Evaluation: scores, and membership figures with their intervals."""
