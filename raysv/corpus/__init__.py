"""Recordings in, labelled waveforms out."""
