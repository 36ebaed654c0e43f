"""`python -m tests.fuzz`."""

from tests.fuzz.report import main

if __name__ == "__main__":
    main()
