"""Rows of docs/ecosystem.md: what people use models with, tried on a transplant of five architectures."""
