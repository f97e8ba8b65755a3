"""What pictures, priors and tokenizers are worth."""
