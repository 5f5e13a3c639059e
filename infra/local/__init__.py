"""Servers of the usual kinds on one machine, without root and without containers."""
