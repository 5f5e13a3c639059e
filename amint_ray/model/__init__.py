"""Model: backbone, taps and MINT head."""
