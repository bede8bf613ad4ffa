"""Benchmarks: what they time, rivals and ceilings in the same run, raw samples, an error in every cell."""
