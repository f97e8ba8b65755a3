"""`python tests/bench`, or `python -m bench` with tests/ on the path."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if not __package__:  # run as a folder: its modules are not to stand in the place of packages with their names
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from bench.cli import main

    sys.exit(main())
