"""Encoder/decoder pairs and the VAE that joins them. No loss inside."""
