"""Graft a language onto a Llama-family base model, and teach it to talk."""

__version__ = "0.1.0"
