"""Memory, arithmetic and time of a recipe."""
