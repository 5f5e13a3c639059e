"""Membership inference attacks of the literature, measured alike on one model and one split."""
