"""The usual failures of a trained model."""
