"""Autoregressive decoding: caches, guidance, truncation, noise."""
