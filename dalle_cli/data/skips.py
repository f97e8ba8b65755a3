"""Samples that cannot be used: they are counted and listed beside the output, and never stop a run."""

import json
import threading
from collections import Counter
from pathlib import Path

from dalle_cli.artifacts.text import write_text


class BadSample(Exception):
    """One sample cannot be used; str() is a short reason, "category" or "category: detail". Callers count it."""


class SkipLog:
    """The skipped samples and why: each (id, reason) once, for any number of threads and epochs."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def add(self, sample_id: str, reason: str) -> None:
        """Count a sample; bytes of its name that are not UTF-8 are escaped."""
        name = sample_id.encode("utf-8", "backslashreplace").decode()
        with self._lock:
            self._seen.add((name, " ".join(reason.split())))

    @property
    def count(self) -> int:
        """How many (id, reason) pairs were counted."""
        return len(self._seen)

    def entries(self) -> list[tuple[str, str]]:
        """All (id, reason), sorted, so that the order of threads does not matter."""
        with self._lock:
            return sorted(self._seen)

    def summary(self) -> str:
        """A short text such as "3 skipped (2 unreadable, 1 oversized)", or "" if nothing was skipped."""
        entries = self.entries()
        if not entries:
            return ""
        kinds = Counter(reason.partition(":")[0] for _, reason in entries)
        parts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
        return f"{len(entries):,} skipped ({parts})"

    def load(self, path: Path) -> None:
        """Add the list of an unfinished run, whose bad samples the resumed run does not read again."""
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.add(row["id"], row["reason"])

    def write(self, path: Path) -> None:
        """Write one JSON object per line, {"id", "reason"}, atomically; no file if nothing was skipped."""
        rows = [{"id": name, "reason": reason} for name, reason in self.entries()]
        if rows:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        else:
            path.unlink(missing_ok=True)
