"""Data sets in, augmentation, captions: numpy and PIL only, so that no stage pays for torch by reading data."""
