"""``python -m assign``."""

from assign.cli import main

main()
