"""Token ids against tiktoken and Hugging Face's tokenizers, given the same vocabulary, on more than a megabyte of mixed text;
the BPE trainer against theirs, merge by merge."""

import base64
import json
import os
import pathlib
import re
import subprocess

import numpy
import pytest

tiktoken = pytest.importorskip("tiktoken")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from mixed_text import mixed_text  # noqa: E402

STROBE = pathlib.Path(os.environ.get("STROBE_BUILD_DIR", "build/test")) / "bin" / "strobe"
END_OF_TEXT = "<|endoftext|>"
TEXT = mixed_text(1_300_000)
TRAINING_TEXT = mixed_text(600_000, seed=2)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": CONTRACTIONS + r"""|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?|"
             r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + CONTRACTIONS + "?|"
             r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def strobe(*arguments, **options):
    return subprocess.run([STROBE, "tokenizer", *map(str, arguments)], check=True, capture_output=True, **options).stdout


def encode(tokenizer, text, *options):
    out = strobe("encode", "--tokenizer", tokenizer, "--binary", *options, input=text.encode("utf-8"))
    return numpy.frombuffer(out, dtype="<i4").tolist()


def assert_same(ours, theirs):
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
        pytest.fail(f"first difference at token {at}: {ours[at - 3:at + 5]} and {theirs[at - 3:at + 5]}")


def decode_printable():
    """GPT-2's printable character -> byte."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printing]
    return {**{chr(b): b for b in printing}, **{chr(256 + i): b for i, b in enumerate(others)}}


def ranks_of(vocabulary):
    table = decode_printable()
    return {bytes(table[c] for c in token): rank for token, rank in vocabulary.items() if token != END_OF_TEXT}


@pytest.fixture(scope="module", params=PATTERNS)
def trained(request, tmp_path_factory):
    """(name of the pattern, folder of a vocabulary that strobe trained with it)"""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "text.txt").write_bytes(TRAINING_TEXT.replace(END_OF_TEXT, "").encode("utf-8"))
    strobe("train", "--data", folder / "text.txt", "--out", folder / "vocabulary", "--vocab-size", 3000, "--pattern", request.param)
    return request.param, folder / "vocabulary"


def vocabulary_of(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]


def test_text_is_what_it_should_be():
    assert len(TEXT.encode("utf-8")) >= 1_300_000
    assert len(set(TEXT)) > 8_000
    assert len(re.findall(r"\s{100,}", TEXT)) > 50
    assert TEXT.count("namespace") > 50 and TEXT.count("return ") > 200
    for first, last in [("а", "я"), ("א", "ת"), ("ऄ", "ह"), ("가", "힣"), ("一", "龥"), ("\U0001F300", "\U0001F64F"), ("\u0300", "\u036f")]:
        assert len(re.findall(f"[{first}-{last}]", TEXT)) > 1_000, (first, last)


def test_same_as_tiktoken(trained):
    name, folder = trained
    vocabulary = vocabulary_of(folder)
    theirs = tiktoken.Encoding("ours", pat_str=PATTERNS[name], mergeable_ranks=ranks_of(vocabulary),
                               special_tokens={END_OF_TEXT: vocabulary[END_OF_TEXT]})
    assert_same(encode(folder, TEXT), theirs.encode_ordinary(TEXT))
    assert_same(encode(folder, TEXT, "--special"), theirs.encode(TEXT, allowed_special="all"))


def test_same_as_tiktoken_from_its_own_file(trained, tmp_path):
    name, folder = trained
    ranks = ranks_of(vocabulary_of(folder))
    file = tmp_path / {"gpt2": "r50k.tiktoken", "cl100k": "cl100k.tiktoken", "o200k": "o200k.tiktoken"}[name]
    file.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))
    theirs = tiktoken.Encoding("ours", pat_str=PATTERNS[name], mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})
    assert_same(encode(file, TEXT, "--special"), theirs.encode(TEXT, allowed_special="all"))


def test_same_as_transformers(trained):
    _, folder = trained
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token == END_OF_TEXT
    # transformers always recognises special tokens.
    ids = encode(folder, TEXT, "--special")
    assert_same(ids, theirs(TEXT, add_special_tokens=False)["input_ids"])
    assert theirs.decode(ids, clean_up_tokenization_spaces=False) == TEXT


def test_same_as_transformers_gpt2_class(trained):
    name, folder = trained
    if name != "gpt2":
        assert not (folder / "vocab.json").exists()
        return
    theirs = transformers.GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    assert_same(encode(folder / "vocab.json", TEXT, "--special"), theirs(TEXT)["input_ids"])


def test_decoding_gives_the_bytes_back(trained):
    _, folder = trained
    for data in (TEXT.encode("utf-8"), bytes(range(256)) * 40, b"\xff\xfe broken \xe2\x82 utf-8 \xed\xa0\x80"):
        ids = strobe("encode", "--tokenizer", folder, "--binary", input=data)
        assert strobe("decode", "--tokenizer", folder, "--binary", input=ids) == data


def hugging_face_bpe(size):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator([TRAINING_TEXT.replace(END_OF_TEXT, "")], trainer)
    return theirs


def test_their_vocabulary_gives_their_tokens(tmp_path):
    theirs = hugging_face_bpe(4000)
    theirs.add_special_tokens([END_OF_TEXT])
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert_same(encode(tmp_path, TEXT, "--special"), theirs.encode(TEXT).ids)
    theirs.model.save(str(tmp_path))
    assert_same(encode(tmp_path / "vocab.json", TEXT.replace(END_OF_TEXT, "")), theirs.encode(TEXT.replace(END_OF_TEXT, "")).ids)


def test_training_finds_the_same_merges(tmp_path):
    theirs = json.loads(hugging_face_bpe(2999).to_str())["model"]
    (tmp_path / "text.txt").write_bytes(TRAINING_TEXT.replace(END_OF_TEXT, "").encode("utf-8"))
    strobe("train", "--data", tmp_path / "text.txt", "--out", tmp_path / "ours", "--vocab-size", 3000)
    ours = json.loads((tmp_path / "ours" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert [line.split(" ") for line in ours["merges"]] == [list(pair) for pair in theirs["merges"]]
    assert {token: rank for token, rank in ours["vocab"].items() if token != END_OF_TEXT} == theirs["vocab"]
