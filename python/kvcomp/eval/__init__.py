"""Measuring quality: generated tasks, perplexity and their evaluation."""
