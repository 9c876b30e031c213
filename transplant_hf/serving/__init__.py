"""Transplants in inference engines that build their own models."""
