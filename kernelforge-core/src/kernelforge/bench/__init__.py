"""Benchmarks: latency statistics, peers measured in the same run, and the suite with its baselines."""
