"""`python -m sela_cli`, so that `torchrun -m sela_cli` works too."""

from sela_cli.cli import main

main()
