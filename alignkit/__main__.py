"""`python -m alignkit` is the command `alignkit`."""

from alignkit.cli import main

main()
