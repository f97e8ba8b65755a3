"""Samples that cannot be used: counted, named beside the output, never a reason to stop."""

import json
import os
import threading
from collections import Counter
from pathlib import Path


class BadSample(Exception):
    """One sample is unusable; str() is a short reason, "category" or "category: detail". Callers count it and go on."""


class SkipLog:
    """What was skipped and why: each (id, reason) once, whatever the number of threads and epochs."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def add(self, sample_id: str, reason: str) -> None:
        """Count a sample; a name that is not UTF-8 is kept in escaped form."""
        name = sample_id.encode("utf-8", "backslashreplace").decode()
        with self._lock:
            self._seen.add((name, " ".join(reason.split())))

    @property
    def count(self) -> int:
        """How many (id, reason) pairs were counted."""
        return len(self._seen)

    def entries(self) -> list[tuple[str, str]]:
        """All (id, reason), sorted, so that the list does not depend on which thread was first."""
        with self._lock:
            return sorted(self._seen)

    def summary(self) -> str:
        """A short text such as "3 skipped (2 unreadable, 1 oversized)"; empty when there was none."""
        entries = self.entries()
        if not entries:
            return ""
        kinds = Counter(reason.partition(":")[0] for _, reason in entries)
        parts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
        return f"{len(entries):,} skipped ({parts})"

    def load(self, path: Path) -> None:
        """Take over the list of an earlier, unfinished run, whose bad samples a resumed run does not meet again."""
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.add(row["id"], row["reason"])

    def write(self, path: Path) -> None:
        """Write one JSON object a line, {"id", "reason"}, atomically; when nothing was skipped there is no file."""
        entries = self.entries()
        if not entries:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for sample_id, reason in entries:
                    file.write(json.dumps({"id": sample_id, "reason": reason}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
