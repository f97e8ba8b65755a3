"""Image grids, charts and terminal previews."""
