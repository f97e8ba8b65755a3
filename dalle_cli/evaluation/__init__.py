"""Metrics of images, dVAEs and priors, and near-duplicates of data sets."""
