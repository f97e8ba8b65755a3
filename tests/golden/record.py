"""Record the golden outputs of tests/test_golden.py anew, and print which entries changed.

python tests/golden/record.py
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import test_golden as golden  # noqa: E402


def main() -> None:
    """Run all groups, compare with the record, write it."""
    path, machine = HERE / "golden.json", golden.fingerprint()
    before, old = golden.read() if path.exists() else (machine, {})
    with tempfile.TemporaryDirectory() as folder:
        made = golden.Golden(Path(folder))
        entries = {group: getattr(made, group) for group in golden.GROUPS}
        info = made.info
    for group, found in entries.items():
        for name, how in sorted(golden.changes(found, old.get(group, {}), before == machine).items()):
            print(f"{group} {name}: {how.splitlines()[0]}")
    known = golden.read_info() if (HERE / "info.json").exists() else {}
    for name in info.keys() | known.keys():
        if info.get(name) != known.get(name):
            print(f"info {name}: another text")
    (HERE / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    groups = []
    for group, found in entries.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in found.items())
        groups.append(f" {json.dumps(group)}: {{\n{lines}\n }}")
    whole = ",\n".join(groups)
    path.write_text(f'{{"machine": {json.dumps(machine)},\n"entries": {{\n{whole}\n}}}}\n')


if __name__ == "__main__":
    main()
