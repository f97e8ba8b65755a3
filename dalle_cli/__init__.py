"""DALL-E and DALL-E 2 as stages over safetensors artifacts."""

__version__ = "0.1.0"
