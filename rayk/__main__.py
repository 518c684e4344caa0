"""`python -m rayk`: the command line."""

from rayk.cli import main

main()
