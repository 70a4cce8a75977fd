"""`python -m parallel_tune`."""

from parallel_tune.cli import main

main()
