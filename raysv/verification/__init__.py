"""Embeddings and pairs in, error rates out."""
