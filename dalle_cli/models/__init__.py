"""Networks: one idea per file, a config dataclass and its module; only torch, no I/O."""
