"""One module per stage: parse, read, call, write, print. No mathematics; heavy imports live inside `run`."""
