"""Tracking: MLflow runs and registered models."""

import os

# Before MLflow is imported anywhere: a run has no business telling a vendor about itself.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
