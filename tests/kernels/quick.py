"""jit for tests of numbers: XLA compiles an interpreted kernel in half the time if it is not to optimize it."""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

quick_jit = functools.partial(jax.jit, compiler_options=OPTIONS)
