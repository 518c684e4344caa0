"""Measured claims: each module is a command (`python -m tests.benchmarks.NAME`) that prints; `make bench` runs all."""
