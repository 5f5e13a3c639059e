"""Train: the joint step and its loop. Read `step.py` first."""
