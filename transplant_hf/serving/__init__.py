"""Transplants on servers: that of Transformers, and engines that build their own models."""
