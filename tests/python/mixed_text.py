"""Text that is hard on tokenizers: many scripts, emoji, code, contractions, and runs of every kind of whitespace. Deterministic."""

import pathlib
import random

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Inclusive ranges of characters that have long been assigned; unassigned ones among them are tokens' business too.
SCRIPTS = {
    "latin": [(0x61, 0x7A), (0x41, 0x5A)],
    "latin accents": [(0xC0, 0x24F)],
    "greek": [(0x391, 0x3C9)],
    "cyrillic": [(0x410, 0x44F)],
    "armenian": [(0x561, 0x586)],
    "hebrew": [(0x5D0, 0x5EA), (0x5B0, 0x5BD)],
    "arabic": [(0x620, 0x64A), (0x64B, 0x655), (0x660, 0x669)],
    "devanagari": [(0x904, 0x939), (0x93E, 0x94D), (0x966, 0x96F)],
    "thai": [(0xE01, 0xE3A), (0xE40, 0xE4E)],
    "georgian": [(0x10D0, 0x10F0), (0x1C90, 0x1CB0)],
    "hangul": [(0xAC00, 0xD7A3), (0x1100, 0x1112)],
    "kana": [(0x3041, 0x3096), (0x30A1, 0x30FA)],
    "han": [(0x4E00, 0x9FA5), (0x20000, 0x20100)],
    "digits": [(0x30, 0x39), (0x30, 0x39), (0xB2, 0xB3), (0x2160, 0x216F), (0x2460, 0x2473), (0x1D7CE, 0x1D7FF)],
    "math": [(0x2200, 0x22FF), (0x1D400, 0x1D454)],
    "punctuation": [(0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0x7B, 0x7E), (0x2010, 0x2027), (0x3001, 0x3011)],
    "marks": [(0x300, 0x36F), (0x20D0, 0x20DC), (0xFE00, 0xFE0F)],
    "emoji": [(0x1F600, 0x1F64F), (0x1F300, 0x1F3FA), (0x1F3FB, 0x1F3FF), (0x1F900, 0x1F945), (0x2600, 0x26FF)],
    "unicode 15 and 16": [(0x31350, 0x323AF), (0x2EBF0, 0x2EE5D), (0x1C89, 0x1C8A), (0x10D40, 0x10D85), (0x11F02, 0x11F59)],
    "private and controls": [(0xE000, 0xE010), (0x1, 0x8), (0xE, 0x1F), (0x7F, 0x84), (0x86, 0x9F)],
    "invisible": [(0x200B, 0x200F), (0x2060, 0x2064), (0xFEFF, 0xFEFF), (0x180E, 0x180E), (0xFFF9, 0xFFFD), (0xAD, 0xAD)],
}
SPACES = [" ", " ", " ", "\n", "\t", "\r\n", "\r", "\u000b", "\u000c", "\u0085", "\u00a0", "\u1680", "\u2003", "\u2028", "\u2029",
          "\u202f", "\u205f", "\u3000"]
FIXED = ["'s", "'S", "'re", "'LL", "don't", "WE'VE", "\u017f", "it'\u017f", "\u2019s", "\U0001F468\u200D\U0001F469\u200D\U0001F467",
         "\U0001F1E9\U0001F1EA", "e\u0301", "caf\u00e9", "<|endoftext|>", "<|endoftext", "3.14159", "1,000,000", "0x7fff", "a_b", "CamelCaseWord",
         "HTTPServer", "https://example.org/a?b=c&d=%20#e", "name@example.org", "\u212a", "\ufb03", "\u01c5"]


def mixed_text(size, seed=1):
    """At least `size` bytes of UTF-8."""
    rng = random.Random(seed)
    names = list(SCRIPTS)
    code = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "src").rglob("*.[ch]pp"))[:40]] or ["int main() {}\n"]
    parts, length = [], 0
    while length < size:
        kind = rng.random()
        if kind < 0.60:
            ranges = SCRIPTS[rng.choice(names)]
            word = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 9)))
        elif kind < 0.80:
            word = rng.choice(FIXED)
        elif kind < 0.99:
            word = "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 12 if kind < 0.97 else 300)))
        else:
            text = rng.choice(code)
            start = rng.randrange(max(1, len(text) - 2000))
            word = text[start:start + rng.randint(50, 2000)]
        if rng.random() < 0.6:
            word += rng.choice(["", " ", " ", " ", "\n", ", ", ". "])
        parts.append(word)
        length += len(word.encode("utf-8"))
    return "".join(parts)
