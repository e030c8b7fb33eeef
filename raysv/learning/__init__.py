"""Labelled views in, trained encoder out: plain PyTorch."""
