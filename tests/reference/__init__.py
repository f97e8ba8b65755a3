"""Slow, plain float64 twins of the package's networks; they share no code with it."""
