"""What all tests share."""

from __future__ import annotations

import os

# Before anything imports MLflow: no test talks to a vendor.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
