"""Tracking: MLflow runs and registered models."""
