"""`python -m ckpt_cli`, the same as `ckpt`."""

from ckpt_cli.cli.main import main

main()
