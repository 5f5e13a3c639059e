"""Data: who is a member, and batches of D and E."""
