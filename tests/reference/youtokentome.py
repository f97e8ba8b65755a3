"""The rule by which YouTokenToMe encodes a text with a text model, step by step."""

from itertools import pairwise


def read(model: str) -> tuple[dict[str, int], list[tuple[int, int, int]], dict[str, int]]:
    """A text model: characters to ids, rules (left, right, made) by priority, and the special ids."""
    lines = model.strip().split("\n")
    n_chars, n_rules = map(int, lines[0].split())
    chars = {chr(int(code)): int(number) for code, number in (line.split() for line in lines[1 : 1 + n_chars])}
    rules = [tuple(map(int, line.split())) for line in lines[1 + n_chars : 1 + n_chars + n_rules]]
    special = dict(zip(("unk", "pad", "bos", "eos"), map(int, lines[-1].split()), strict=True))
    return chars, rules, special  # type: ignore[return-value]


def words(text: str) -> list[str]:
    """Split at ASCII blanks and at the sign that stands for a blank."""
    found, word = [], ""
    for character in text + " ":
        if character in " \t\n\v\f\r\u2581":
            found += [word] if word else []
            word = ""
        else:
            word += character
    return found


def encode(text: str, model: str) -> list[int]:
    """Pieces of a text, without BOS and EOS."""
    chars, rules, special = read(model)
    ranks = {(left, right): (rank, made) for rank, (left, right, made) in enumerate(rules)}
    out = []
    for word in words(text):
        ids: list[int] = []
        for character in "\u2581" + word:
            if character in chars:
                ids.append(chars[character])
            elif not ids or ids[-1] != special["unk"]:
                ids.append(special["unk"])
        while True:
            found = [(ranks[pair][0], i) for i, pair in enumerate(pairwise(ids)) if pair in ranks]
            if not found:
                break
            _, i = min(found)
            ids[i : i + 2] = [ranks[ids[i], ids[i + 1]][1]]
        out += ids
    return out
