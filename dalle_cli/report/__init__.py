"""The HTML pages of `report` and `survey`."""
