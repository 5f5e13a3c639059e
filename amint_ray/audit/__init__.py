"""Audits: from what a model says of suspects to a verdict with its error rates, and a report."""
