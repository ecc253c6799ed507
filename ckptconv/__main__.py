"""`python -m ckptconv` is the command line."""

from ckptconv.cli import main

main()
