"""Waveform in, embedding out."""
