"""How texts are cut into words before they become tokens, by the names that GGUF files have for it.

A file only names the way (``tokenizer.ggml.pre``). What each name means is written here, as the original ``tokenizer.json`` of
the models has it that are called so.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers


@dataclass(frozen=True, slots=True)
class Cutting:
    """What a name stands for.

    Attributes:
        words: cuts a text. normalizer: what happens to it before.
        whole_words: a word that is a token becomes that token, whatever the merges would make of it.
        begins: a text begins with BOS, where the file does not say whether it does.
    """

    words: pre_tokenizers.PreTokenizer
    normalizer: normalizers.Normalizer | None = None
    whole_words: bool = False
    begins: bool = False


def _byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def _split(*patterns: str, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    """Each pattern cuts the pieces that those before it have left; `digits`: then each digit stands alone."""
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    alone = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    return _byte_level(*cuts, *alone, use_regex=False)


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_SEED_SPLIT = _QWEN2_SPLIT.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _CONTRACTIONS
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""Letters with a case, as DeepSeek lists them: those of newer versions of Unicode, and some others, are not among them."""
_CJK = "[一-龥ࠀ-一가-퟿]+"
_DEEPSEEK = ("[\r\n]", f"\\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK)
_DEEPSEEK_CODER = ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)

_GPT2 = Cutting(_byte_level(use_regex=True))
_SINGLE_DIGITS = Cutting(_byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True))
_LLAMA3 = Cutting(_split(_LLAMA3_SPLIT), whole_words=True, begins=True)
_LLAMA3_MERGED = Cutting(_split(_LLAMA3_SPLIT))
_QWEN2 = Cutting(_split(_QWEN2_SPLIT), normalizers.NFC())
_GPT4O = Cutting(_split(_GPT4O_SPLIT))
CUTTINGS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "gigachat": _GPT2,
    "a.x-4.0": _GPT2,
    "mellum": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "olmo": _GPT2,  # GPT-NeoX, too
    "command-r": _SINGLE_DIGITS,
    "minerva-7b": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "midm-2.0": _LLAMA3,
    "dbrx": _LLAMA3_MERGED,  # OLMo 2
    "smaug-bpe": _LLAMA3_MERGED,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "seed-coder": Cutting(_split(_SEED_SPLIT)),
    "gpt-4o": _GPT4O,  # Phi-4-mini and gpt-oss
    "kanana2": _GPT4O,
    "tekken": Cutting(_split(_TEKKEN_SPLIT), whole_words=True, begins=True),
    "deepseek-llm": Cutting(_split(*_DEEPSEEK, digits=True)),  # DeepSeek-V2, too
    "deepseek-coder": Cutting(_split(*_DEEPSEEK_CODER, digits=True)),
    "deepseek-v3": Cutting(_split(*_DEEPSEEK_V3)),
}
"""By ``tokenizer.ggml.pre``."""
