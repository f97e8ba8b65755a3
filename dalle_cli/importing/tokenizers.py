"""Tokenizers of published models as JSON files of the `tokenizers` library, which `data.tokenizer` reads.

Each builder takes the publisher's own files as bytes. BOS, EOS and the pad token go into the JSON's `post_processor`
and `padding`; a `truncation` section means that a caption that is cut keeps its EOS.
"""

import gzip
import json
import logging
import zlib
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from dalle_cli.data.tokenizer import Tokenizer
from dalle_cli.data.tokenizer_rules import ASCII, CLIP_WORDS, FOREIGN, MINI_RULES, SPACE, WHITE, YTTM_BLANKS
from dalle_cli.errors import DalleError

log = logging.getLogger("dalle_cli")

Merges = list[tuple[str, str]]

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # of the merges in OpenAI's file, which has more
YTTM_NAMES = ("<UNK>", "<PAD>", "<BOS>", "<EOS>")


def clip_bpe(data: bytes, length: int) -> bytes:
    """CLIP's tokenizer from its `tokenizer.json`; captions are cut to `length` tokens and keep their EOS.

    Raises:
        DalleError: it is not a tokenizer, or writes no BOS and EOS.
    """
    if [len(side) for side in Tokenizer(data).surrounding] != [1, 1]:
        raise DalleError("expected a tokenizer.json that writes BOS and EOS, as CLIP's does, found another; check it")
    return _written(Library.from_str(data.decode()), length)


def clip_bpe_of_vocabulary(vocab: bytes, merges: bytes, length: int) -> bytes:
    """CLIP's tokenizer from `vocab.json` and `merges.txt`.

    The publisher's rule without its repair of broken text (ftfy) and of HTML entities, as transformers has it.

    Raises:
        DalleError: the files are of something else.
    """
    return _clip(_vocabulary(vocab, START, END), _merges(merges), length)


def clip_bpe_of_merges(data: bytes, length: int) -> bytes:
    """CLIP's tokenizer from OpenAI's `bpe_simple_vocab_16e6.txt.gz`, which has the merges alone.

    Raises:
        DalleError: the file is of something else.
    """
    try:
        merges = _merges(gzip.decompress(data))[:CLIP_MERGES]
    except (OSError, EOFError, zlib.error) as error:
        raise DalleError(f"expected a gzip file of CLIP's merges, found {error}; give another") from None
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the others follow, as characters from 256 on
    letters = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return _clip({token: i for i, token in enumerate(tokens)}, merges, length)


def _clip(vocab: dict[str, int], merges: Merges, length: int) -> bytes:
    library = _bpe(vocab, merges, unk_token=END, end_of_word_suffix="</w>")
    library.add_special_tokens([START, END])
    library.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(WHITE), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False)])
    library.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    library.post_processor = _surround(vocab, START, END)
    return _written(library, length)


def bart_bpe(vocab: bytes, merges: bytes, length: int) -> bytes:
    """The tokenizer of DALL-E mini and mega from `vocab.json` and `merges.txt`.

    Text is normalized by those of the publisher's rules that regular expressions hold. Letters with accents become
    ASCII, and others, as well as emoji, are left out, where the publisher spells them in ASCII.

    Raises:
        DalleError: the files are of something else.
    """
    table = _vocabulary(vocab, "<s>", "</s>", "<pad>")
    library = _bpe(table, _merges(merges), unk_token="<unk>" if "<unk>" in table else None)
    library.add_special_tokens([token for token in ("<s>", "<pad>", "</s>", "<unk>") if token in table])
    to_ascii = [normalizers.Replace(Regex(pattern), text) for pattern, text in ASCII.items()]
    rules = [normalizers.Replace(Regex(pattern), text) for pattern, text in MINI_RULES]
    foreign = normalizers.Replace(Regex(FOREIGN), "")
    plain = [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    library.normalizer = normalizers.Sequence([*plain, *to_ascii, foreign, *rules])
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    library.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    library.post_processor = _surround(table, "<s>", "</s>")
    return _written(library, length, "<pad>")


def char_bpe(vocab: bytes, merges: bytes) -> bytes:
    """minDALL-E's tokenizer from `bpe-16k-vocab.json` and `bpe-16k-merges.txt`: no BOS or EOS, `[PAD]` behind the text.

    Raises:
        DalleError: the files are of something else.
    """
    table = _vocabulary(vocab, "[UNK]", "[PAD]")
    library = _bpe(table, _merges(merges), unk_token="[UNK]", end_of_word_suffix="</w>")
    library.add_special_tokens(["[UNK]", "[PAD]"])
    cleaned = normalizers.BertNormalizer(lowercase=False)  # which leaves accents alone; so does the next
    library.normalizer = normalizers.Sequence([cleaned, normalizers.Lowercase()])
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.BPEDecoder(suffix="</w>")
    return _written(library, 0, "[PAD]")


def youtokentome(data: bytes, bos: bool = True) -> bytes:
    """A tokenizer from a text model of YouTokenToMe: BOS where `bos`, the text, EOS, which is lost if a text is cut.

    Raises:
        DalleError: the file is of something else.
    """
    try:
        rows = [[int(number) for number in line.split()] for line in data.decode().split("\n") if line.strip()]
        (n_chars, n_rules), special = rows[0], dict(zip(YTTM_NAMES, rows[-1], strict=True))
        texts = {id_: chr(code) for code, id_ in rows[1 : 1 + n_chars]}
        merges: Merges = []
        for left, right, made in rows[1 + n_chars : -1]:
            merges.append((texts[left], texts[right]))
            texts[made] = texts[left] + texts[right]
        if len(rows) != 2 + n_chars + n_rules:
            raise ValueError(f"{len(rows)} lines")
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise DalleError(f"expected a text model of YouTokenToMe, found another file ({error}); check it") from None
    vocab = dict(special)
    for id_, text in texts.items():
        vocab.setdefault(text, id_)
    if len(vocab) < len(texts) + len(special):
        log.warning("tokens with the same text as another, which are not used: %d", len(texts) + 4 - len(vocab))
    library = _bpe(vocab, merges, unk_token="<UNK>", fuse_unk=True)
    library.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Strip()])
    blanks = pre_tokenizers.Split(Regex(YTTM_BLANKS), behavior="removed")
    library.pre_tokenizer = pre_tokenizers.Sequence([blanks, pre_tokenizers.Metaspace(SPACE, "always")])
    library.decoder = decoders.Metaspace(SPACE, "always")
    library.post_processor = _surround(vocab, "<BOS>" if bos else "", "<EOS>")
    return _written(library, 0, "<PAD>")


def _vocabulary(data: bytes, *needed: str) -> dict[str, int]:
    """The tokens of a `vocab.json`. Raises: DalleError if it is no such file, or one of `needed` is missing."""
    try:
        table = json.loads(data)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or not all(type(id_) is int and id_ >= 0 for id_ in table.values()):
        raise DalleError("expected a vocab.json of tokens and their numbers, found another file; check it")
    for token in needed:
        if token not in table:
            raise DalleError(f"expected {token} in vocab.json, found a vocabulary without it; give the publisher's")
    return table


def _merges(data: bytes) -> Merges:
    """The pairs of a `merges.txt`, first line first. Raises: DalleError if it is no such file."""
    try:
        lines = data.decode().split("\n")  # other line breaks may be part of a token
    except UnicodeDecodeError:
        raise DalleError("expected a merges.txt in UTF-8, found other bytes; check it") from None
    lines = lines[1:] if "#version" in lines[0] else lines
    rows = [line.removesuffix("\r").split(" ") for line in lines if line.strip()]
    pairs = [(row[0], row[1]) for row in rows if len(row) == 2]
    if not pairs or len(pairs) < len(rows):
        raise DalleError("expected a merges.txt with two tokens a line, found another file; check it")
    return pairs


def _bpe(vocab: dict[str, int], merges: Merges, **options: Any) -> Library:
    try:
        return Library(models.BPE(vocab, merges, **options))
    except Exception as error:  # the library raises a bare Exception
        raise DalleError(f"expected merges of tokens in the vocabulary, found {error}; check both files") from None


def _surround(vocab: dict[str, int], before: str, after: str) -> Any:
    """A post-processor that writes these tokens before and after a text; "" is none."""
    return processors.TemplateProcessing(
        single=[part for part in (before, "$A", after) if part],
        special_tokens=[(name, vocab[name]) for name in (before, after) if name],
    )


def _written(library: Library, length: int, pad: str = "") -> bytes:
    """The JSON: EOS is kept where `length` is given; texts are padded with `pad`, or with token 0."""
    library.no_truncation()
    if length:
        library.enable_truncation(length)
    library.enable_padding(pad_id=library.token_to_id(pad) if pad else 0, pad_token=pad or library.id_to_token(0) or "")
    return str(library.to_str(pretty=False)).encode()
