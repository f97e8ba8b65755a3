"""Bundles: find, fetch and send them; the model card."""
