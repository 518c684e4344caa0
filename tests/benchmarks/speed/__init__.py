"""Benchmarks of speed, memory and bytes: each module is a command (`python -m tests.benchmarks.speed.NAME`)."""
