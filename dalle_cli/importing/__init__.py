"""Published checkpoints to bundles: readers of their formats, and one name map per publication."""
