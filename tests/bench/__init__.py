"""Speed and memory beside other implementations: `make bench`, or `python tests/bench --help`."""
