"""Checks of a trained model for the usual failures, by the loss and the validation of its own task."""
