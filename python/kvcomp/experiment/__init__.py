"""Experiments described by a YAML file: configuration, measuring, reports, plots and tables."""
