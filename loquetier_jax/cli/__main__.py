"""Makes `python -m loquetier_jax.cli` equivalent to `loquetier`."""

import sys

from loquetier_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
