"""`python -m dalle_cli` is the command `dalle`."""

from dalle_cli.cli import main

if __name__ == "__main__":
    main()
