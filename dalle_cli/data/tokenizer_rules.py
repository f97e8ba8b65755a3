"""The regular expressions in tokenizers of published models; a tokenizer JSON may hold these and no others."""

CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""
# The same in the publisher's own JSON.
CLIP_WORDS_PUBLISHED = CLIP_WORDS.replace(r"\p{L}+|\p{N}|", r"[\p{L}]+|[\p{N}]|")
SPACE = "\u2581"  # how YouTokenToMe writes the blank before a word
YTTM_BLANKS = f"[\\t-\\r {SPACE}]+"

# Stand-ins for letters and signs that do not become ASCII when their accents are taken off.
ASCII = {
    "[\u2018\u2019\u02bc\u2032]": "'", "[\u201c-\u201f\u00ab\u00bb\u2033]": '"', "[\u2010-\u2015\u2212]": "-",
    "ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "ł": "l", "þ": "th", "ı": "i",
}  # fmt: skip
# DALL-E mini's rules for captions in the publisher's order, but those that need a list of words or of emoji.
MINI_RULES = (
    (r"\A\s*\[\d+\]|\[\d+\]\s*\z", ""),  # a footnote's number
    (r"<[^<]+?>", " "), (r"http\S+", ""),
    (r"(?<=\d),(?=\d{3})", ""), (r"(?<=\d),(?=\d{3})", ""),  # twice, as there
    (r"(?<=\w)-(?=\w)", " "),
    ("%", " % "), ("&", " & "), (r"\$", " $ "), (r"\*", " * "),
    (r"[_#\\]", " "),
    (r"(?!'(?:[stdm]|ll|re|ve)\b)['\"`]", ' " '),
    (r"(?<!\d)/|/(?!\d)|(?<!\w)\.|\.(?!\w)|[()\[\],|:;?!=+~\-{}]", ","),
    (r"(\D)\1{2,}(?=\1)", ""),  # a character four times or more becomes one
    (r'(?:\s*"+\s*)+', ' " '),
    (r"(?:\s*,+\s*)+", ", "),
    (r"\s+", " "), (r"\A\s*,?\s*|\s*,?\s*\z", ""),
)  # fmt: skip
FOREIGN = r"[^\s!-~]+"
WHITE = r"\s+"

SPLITS = frozenset((CLIP_WORDS, CLIP_WORDS_PUBLISHED, YTTM_BLANKS))
REPLACEMENTS = frozenset((*ASCII.items(), *MINI_RULES, (FOREIGN, ""), (WHITE, " ")))
