"""A thousand captions in many languages and scripts, the same on each call."""

import random

WORDS = {
    "english": "a an the red blue tutu radish walking dog armchair avocado painting of in style don't it's Café ARTIST",
    "german": "ein großer Fuchs über der Straße Überraschung Äpfel schön Donaudampfschifffahrtsgesellschaft",
    "french": "une pomme d'été œuvre l'hôtel garçon naïve où élève",
    "polish": "zażółć gęślą jaźń kot na łódce świeci",
    "turkish": "kırmızı İstanbul ığdır şeker güneş",
    "vietnamese": "con mèo đỏ trên bàn phở nước",
    "russian": "красный кот на столе Ёлка радуга объект",
    "greek": "κόκκινη γάτα θάλασσα ουρανός",
    "arabic": "قطة حمراء على الطاولة مَرْحَبًا",
    "hebrew": "חתול אדום על השולחן",
    "hindi": "लाल बिल्ली मेज़ पर हिन्दी",
    "thai": "แมวสีแดงบนโต๊ะ",
    "korean": "빨간 사과 위의 고양이 서울",
    "japanese": "赤い猫 テーブルの上 ひらがな ｶﾀｶﾅ",
    "chinese": "红色的猫 坐在桌子上 東京塔",
    "numbers": "1 42 007 3.14 1,000 2024 ½ x² 1st ４２ ٣",
    "signs": "! ? ... , ; - -- ( ) [ ] { } / & % $ * + = ~ @ ^ | \\ \" ' ` “quoted” ‘so’ — – … € © ™",
    "emoji": "🎨 🐕 👩‍👩‍👧‍👦 🇰🇷 ❤️ 👍🏽 🍎",
    "combining": "e\u0301te\u0301 n\u0303 \u1100\u1161\u11a8 a\u0328\u0301 \u0915\u093c",
    "odd": "\u200b \ufeff \u00ad \u0000 \ufffd \U0001d400\U0001d401 ﬁne \u2581 \u00a0 zzzzzzz",
}
BLANKS = (" ", " ", " ", " ", "  ", "\t", "\n", " \r\n ", "\u3000", "", ",", ", ", ". ")
EDGES = ("", " ", "   ", "\n", "x" * 300, "ab" * 200, "猫" * 120, "a " * 150, "é" * 90, "!" * 100, "🎨" * 40)


def captions(*languages: str, n: int = 1000, blanks: tuple[str, ...] = BLANKS) -> list[str]:
    """`n` captions of up to twelve words of one or two of the languages (all by default), and the edge cases."""
    rng, known = random.Random(0), languages or tuple(WORDS)
    out = list(EDGES) if not languages else []
    while len(out) < n:
        words = [
            word
            for name in rng.sample(known, min(len(known), rng.choice((1, 1, 2))))
            for word in WORDS[name].split(" ")
        ]
        rows = [rng.choice(words) for _ in range(rng.randint(1, 12))]
        out.append("".join(word + rng.choice(blanks) for word in rows))
    return out
