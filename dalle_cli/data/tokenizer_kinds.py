"""Which tokenizer JSON is read: the kinds that `train-tokenizer` and `import` write and publishers of CLIP do.

The library runs what a JSON says, and that may be anything: regular expressions that take hours, replacements that
grow a text a thousandfold, merges at random. So a file is compared with the kinds known here before it is given to
the library, and everything else is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from dalle_cli.artifacts import strict_json
from dalle_cli.data.tokenizer_rules import REPLACEMENTS, SPLITS
from dalle_cli.errors import DalleError

MAX_BYTES = 64 << 20
MAX_TOKENS = 1 << 20
MAX_PARTS = 64  # of a sequence
MAX_ADDED = 1024  # tokens beside the vocabulary
LONGEST = 1024  # characters of a token

Check = Callable[[Any], bool]


def is_text(most: int) -> Check:
    return lambda value: isinstance(value, str) and len(value) <= most


def is_int(most: int) -> Check:
    return lambda value: type(value) is int and 0 <= value <= most


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def one_of(*values: Any) -> Check:
    return lambda value: any(value == known and type(value) is type(known) for known in values)


def either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


is_token = either(one_of(None), is_text(LONGEST))
is_length = is_int(1 << 20)
is_mark = is_text(16)


def _is_pair(value: Any) -> bool:
    """A token and its number, as post-processors have it."""
    return isinstance(value, list) and len(value) == 2 and is_text(LONGEST)(value[0]) and is_int(MAX_TOKENS)(value[1])


def _is_template(value: Any) -> bool:
    """A few parts; the text itself is once among them."""
    short = isinstance(value, list) and 1 <= len(value) <= 8 and all(isinstance(part, dict) for part in value)
    return short and sum("Sequence" in part for part in value) == 1


def _are_special(value: Any) -> bool:
    """Tokens of a template: {text: {"id", "ids", "tokens"}}."""

    def is_one(entry: Any) -> bool:
        ids = entry.get("ids") if isinstance(entry, dict) else None
        return isinstance(ids, list) and len(ids) <= 8 and all(map(is_int(MAX_TOKENS), ids))

    return isinstance(value, dict) and len(value) <= 8 and all(map(is_one, value.values()))


SPACES: dict[str, Check] = {"add_prefix_space": is_flag, "trim_offsets": is_flag, "use_regex": is_flag}
METASPACE: dict[str, Check] = {
    "replacement": is_text(1), "prepend_scheme": one_of("always", "never", "first"), "split": is_flag,
    "add_prefix_space": is_flag,
}  # fmt: skip
STRIP: dict[str, Check] = {"strip_left": is_flag, "strip_right": is_flag}
ENDS: dict[str, Check] = {"sep": _is_pair, "cls": _is_pair, "trim_offsets": is_flag, "add_prefix_space": is_flag}

# Section -> kind -> the fields that it may have.
KINDS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        **{kind: {} for kind in ("Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents")},
        "Strip": STRIP,
        "Prepend": {"prepend": is_mark},
        "Replace": {"pattern": lambda value: True, "content": is_mark},  # checked as a pair
        "BertNormalizer": {
            "clean_text": is_flag, "handle_chinese_chars": is_flag, "lowercase": is_flag,
            "strip_accents": either(one_of(None), is_flag),
        },
    },
    "pre_tokenizer": {
        "ByteLevel": SPACES,
        "BertPreTokenizer": {},
        "WhitespaceSplit": {},
        "Metaspace": METASPACE,
        "Split": {
            "pattern": lambda value: isinstance(value, dict) and value.get("Regex") in SPLITS and len(value) == 1,
            "behavior": one_of("Removed", "Isolated"), "invert": is_flag,
        },
    },
    "decoder": {
        "ByteLevel": SPACES,
        "BPEDecoder": {"suffix": is_mark},
        "Metaspace": METASPACE,
        "Strip": {"content": is_text(1), "start": is_length, "stop": is_length},
        "Replace": {"pattern": one_of({"String": "</w>"}), "content": one_of(" ", "")},
    },
    "post_processor": {
        "ByteLevel": SPACES,
        "RobertaProcessing": ENDS,
        "BertProcessing": ENDS,
        "TemplateProcessing": {"single": _is_template, "pair": lambda value: True, "special_tokens": _are_special},
    },
}  # fmt: skip
PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
OPTIONAL = ("decoder", "post_processor")

MODEL: dict[str, Check] = {
    "dropout": one_of(None, 0.0), "unk_token": is_token, "continuing_subword_prefix": one_of(None, ""),
    "end_of_word_suffix": either(one_of(None), is_mark), "fuse_unk": is_flag, "byte_fallback": one_of(False),
    "ignore_merges": is_flag,
}  # fmt: skip
ADDED: dict[str, Check] = {
    "id": is_int(MAX_TOKENS), "content": lambda value: is_text(LONGEST)(value) and bool(value),
    **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), is_flag),
}  # fmt: skip
TRUNCATION: dict[str, Check] = {
    "direction": one_of("Right", "Left"), "max_length": is_length, "stride": one_of(0),
    "strategy": one_of("LongestFirst", "OnlyFirst", "OnlySecond"),
}  # fmt: skip
PADDING: dict[str, Check] = {
    "strategy": lambda value: value == "BatchLongest" or (isinstance(value, dict) and is_length(value.get("Fixed"))),
    "direction": one_of("Right", "Left"), "pad_to_multiple_of": either(one_of(None), is_length),
    "pad_id": is_int(MAX_TOKENS), "pad_type_id": is_length, "pad_token": is_text(LONGEST),
}  # fmt: skip


def check(data: bytes) -> dict[str, Any]:
    """The content of a tokenizer JSON that the library may run.

    Raises:
        DalleError: it is no JSON, too large, or has parts of unknown kinds or with unknown settings.
    """
    if len(data) > MAX_BYTES:
        raise _refused(f"{len(data):,} bytes, more than {MAX_BYTES:,}")
    try:
        content = strict_json.parse(data.decode())
    except ValueError as error:
        raise _refused(f"something else ({error})") from None
    for section in KINDS:
        part = content.get(section)
        if part is not None or section not in OPTIONAL:
            _check_section(section, part)
    _check_model(content.get("model"))
    added = content.get("added_tokens", [])
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        raise _refused("added_tokens that are no list, or too many")
    for token in added:
        _check_fields("added token", token, ADDED)
    for name, fields in (("truncation", TRUNCATION), ("padding", PADDING)):
        if content.get(name) is not None:
            _check_fields(name, content[name], fields)
    return content


def _refused(found: str) -> DalleError:
    return DalleError(f"expected a tokenizer JSON of a known kind, found {found}; make one with train-tokenizer")


def _check_section(section: str, part: Any) -> None:
    parts: Any = [part]
    if isinstance(part, dict) and part.get("type") == "Sequence" and section in PARTS:
        parts = part.get(PARTS[section])
        if not isinstance(parts, list) or len(parts) > MAX_PARTS:
            raise _refused(f"a {section} of no parts, or too many")
    for one in parts:
        kind = one.get("type") if isinstance(one, dict) else None
        fields = KINDS[section].get(kind) if isinstance(kind, str) else None
        if fields is None:
            raise _refused(f"the {section} {kind!r:.60}")
        _check_fields(f"{section} {kind}", {name: value for name, value in one.items() if name != "type"}, fields)
        if (section, kind) == ("normalizer", "Replace"):
            pattern = one.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) and len(pattern) == 1 else None
            if not isinstance(regex, str) or (regex, one.get("content")) not in REPLACEMENTS:
                raise _refused(f"the replacement of {pattern!r:.60} by {one.get('content')!r:.60}")


def _check_fields(what: str, table: Any, fields: Mapping[str, Check]) -> None:
    if not isinstance(table, dict):
        raise _refused(f"{what} {table!r:.60}")
    for name, value in table.items():
        if name not in fields or not fields[name](value):
            raise _refused(f"{name!r:.60} = {value!r:.60} of {what}")


def _check_model(model: Any) -> None:
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise _refused(f"the model {model.get('type') if isinstance(model, dict) else model!r:.60}")
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not 1 <= len(vocab) <= MAX_TOKENS:
        raise _refused("a vocabulary of no tokens, or too many")
    if not all(map(is_int(MAX_TOKENS), vocab.values())) or max(map(len, vocab)) > LONGEST:
        raise _refused("tokens that are too long, or numbers that no tokens have")
    if len(set(vocab.values())) < len(vocab):
        raise _refused("a number of two tokens")
    if not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise _refused("merges that are no list, or too many")
    own = ("type", "vocab", "merges")
    _check_fields("the BPE", {name: value for name, value in model.items() if name not in own}, MODEL)
