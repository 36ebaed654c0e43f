"""Benchmarks of serving, on one engine that has the card to itself."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # read when jax starts; its own default is 0.75
