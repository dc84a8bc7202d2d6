"""Tokenizers: the text comes back, special ids lie behind the ordinary ones, a saved one is the same one."""

import builtins
import itertools
import json
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memformer.data import BPETokenizer, ByteTokenizer, TokenIds, Tokenizer, load_tokenizer, tokenizer_fingerprint
from memformer.data.tokenizers import _without_long_words as without_long_words
from memformer.data.tokenizers import text_blocks

CORPUS = ["the memory of a segment is read by every layer and written once. " * 4, "naïve 🙂 naïve 🙂"]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(CORPUS, 300)


@pytest.fixture(scope="module", params=["bytes", "bpe", "ids"])
def tokenizer(request, bpe):
    return {"bytes": ByteTokenizer(), "bpe": bpe, "ids": TokenIds(300)}[request.param]


def word_level(tmp_path, unknown="[UNK]"):
    """A tokenizer.json that is not byte-level."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "one": 1, "two": 2}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    # Its own special tokens are for other models, and are not put around a text here.
    made.post_processor = tokenizers.processors.TemplateProcessing(single="one $A", special_tokens=[("one", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_special_ids_lie_behind_the_ordinary_ones(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    n = tokenizer.ordinary
    assert tokenizer.special == (tokenizer.start, tokenizer.infill, tokenizer.recall, tokenizer.mask)
    assert tokenizer.special == (n, n + 1, n + 2, n + 3)
    assert tokenizer.vocabulary == n + 4
    assert tokenizer.decode(tokenizer.special) == ""
    assert ByteTokenizer().start == 256
    assert ByteTokenizer().vocabulary == 260


@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        tokens = tokenizer.encode(text)
        assert tokens.ndim == 1
        assert tokens.dtype == (np.uint8 if tokenizer.ordinary == 256 else np.uint16)
        assert not len(tokens) or tokens.max() < tokenizer.ordinary
        assert tokenizer.decode(tokens) == tokenizer.decode([tokenizer.start, *tokens]) == text
        assert np.array_equal(tokenizer.encode(text.encode()), tokens)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(text=st.text(max_size=20), cuts=st.lists(st.integers(0, 80), max_size=6))
def test_the_decoder_says_each_character_once_it_is_whole(bpe, text, cuts):
    for tokenizer in (ByteTokenizer(), bpe):
        tokens, decoder, said = tokenizer.encode(text).tolist(), tokenizer.decoder(), ""
        edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
        for first, end in itertools.pairwise(edges):
            said += decoder.decode([tokenizer.start, *tokens[first:end]])
            # U+FFFD itself looks like half a character, and waits.
            assert text.startswith(said)
            assert len(said) >= len(tokenizer.decode(tokens[:end]).rstrip("\ufffd"))
        assert said + decoder.flush() == text


@settings(deadline=None, max_examples=100, derandomize=True)
@given(tokens=st.lists(st.integers(0, 259), max_size=30))
def test_the_decoder_agrees_with_decode_on_any_tokens(bpe, tokens):
    """A model's tokens need not be text."""
    for tokenizer in (ByteTokenizer(), bpe):
        decoder = tokenizer.decoder()
        assert "".join([decoder.decode([token]) for token in tokens] + [decoder.flush()]) == tokenizer.decode(tokens)


def test_a_bpe_is_shorter_than_bytes_and_the_same_each_time(bpe):
    assert bpe.ordinary == 300
    assert len(bpe.encode(CORPUS[0])) < 0.7 * len(CORPUS[0])
    again = BPETokenizer.train((text.encode() for text in CORPUS), 300)
    assert np.array_equal(again.encode(CORPUS[0]), bpe.encode(CORPUS[0]))


def test_a_small_corpus_gives_fewer_tokens_than_asked_for():
    assert BPETokenizer.train(["abab"], 1000).ordinary == 257  # ab, and abab only once


def test_the_callers_tokenizer_stays_as_it_is(bpe):
    other = type(bpe._tokenizer).from_str(bpe._tokenizer.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=6)
    assert len(BPETokenizer(other).encode(CORPUS[0])) > 6
    assert sum(other.encode(CORPUS[0]).attention_mask) == 4
    assert len(other.encode("")) == 6


def test_a_very_long_word_is_trained_on_in_pieces(monkeypatch):
    """A genome is one word, on which the trainer would be at work for hours."""
    seen = []

    def spied(blocks):
        for piece in without_long_words(blocks):
            seen.append(piece)
            yield piece

    monkeypatch.setattr("memformer.data.tokenizers._without_long_words", spied)
    genome = "".join(np.random.default_rng(0).choice(list("ACGT"), 5000))
    text = f"{genome} and {'=' * 3000}\n{' ' * 2500}{'7' * 1024}8 a word-in_pieces, " + "of no length " * 300
    tokenizer = BPETokenizer.train([text], 400)
    assert "".join(seen) == text
    assert max(len(word) for piece in seen for word in re.findall(r"[A-Z]+|=+| +|\d+", piece)) == 1024
    assert len(seen) == 4 + 2 + 2 + 1 + 1
    assert tokenizer.ordinary == 400
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_long_text_is_trained_on_in_blocks(monkeypatch):
    monkeypatch.setattr("memformer.data.tokenizers._BLOCK", 10)
    text = "a line\nanother one that is longer than a block\n\n  and the end, naïve"
    raw = text.encode()
    for parts in ([text], [raw], [raw[:3], b"", raw[3:-4], raw[-4:]]):  # cut inside a character
        blocks = list(text_blocks(parts))
        assert blocks[:3] == ["a line\n", "another on", "e that is "]
        assert "".join(blocks) == text


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    assert (loaded.ordinary, loaded.special) == (tokenizer.ordinary, tokenizer.special)
    if not isinstance(tokenizer, TokenIds):
        assert np.array_equal(loaded.encode(CORPUS[0]), tokenizer.encode(CORPUS[0]))


def test_loading_refuses_what_does_not_fit(bpe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer_config\.json, so no tokenizer was saved here"):
        load_tokenizer(tmp_path)
    bpe.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    saved = json.loads(config.read_text())
    for text, message in [
        ("{", "damaged"),
        ("[]", "damaged"),
        (json.dumps({"kind": "bytes"}), "damaged .*ordinary"),
        (json.dumps({**saved, "kind": "morse"}), "expected a tokenizer of bytes, bpe, ids or base, got 'morse'"),
        (json.dumps({**saved, "ordinary": 400}), "expected 400 ordinary tokens .* got 300 .* do not belong together"),
        (json.dumps({**saved, "mask": 0}), "do not belong together"),
    ]:
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    config.write_text(json.dumps(saved))
    (tmp_path / "tokenizer.json").write_text("no")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer\.json of the tokenizers library"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)


def test_any_tokenizer_json_serves(tmp_path):
    words = BPETokenizer.from_file(word_level(tmp_path))
    assert words.ordinary == 3
    assert words.encode("two one").tolist() == [2, 1]
    assert words.decode([2, 1, words.start]) == "two one"
    decoder = words.decoder()
    assert [decoder.decode([i]) for i in (2, words.mask, 1)] == ["two", "", " one"]


def test_a_character_without_a_token_is_refused(tmp_path):
    words = BPETokenizer.from_file(word_level(tmp_path))
    with pytest.raises(ValueError, match=r"no token for 'three' \(character 4 of the text\): use a byte-level one"):
        words.encode("one three")


def test_a_word_that_is_the_unknown_token_is_not_refused(bpe, tmp_path):
    """A byte-level vocabulary needs no unknown token, even if it names one."""
    bpe.save(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary["model"]["unk_token"] = "e"
    (tmp_path / "named.json").write_text(json.dumps(vocabulary))
    assert BPETokenizer.from_file(tmp_path / "named.json").decode(bpe.encode("e")) == "e"
    assert len(BPETokenizer.from_file(tmp_path / "named.json").encode("e"))


def test_token_ids_are_written_as_numbers_and_take_no_other_text():
    ids = TokenIds(10)
    assert ids.encode("3 9\n0").tolist() == ids.encode(b"3 9\n0").tolist() == [3, 9, 0]
    assert len(ids.encode("")) == 0
    assert ids.decode([3, ids.start, 9]) == "3 9"
    decoder = ids.decoder()
    assert "".join(decoder.decode([i]) for i in (3, ids.mask, 9)) + decoder.flush() == "3 9"
    for wrong in ("text", "3, 9", "10", "-1", "²"):
        with pytest.raises(ValueError, match=r"token ids without a text form.* numbers from 0 to 9 with spaces"):
            ids.encode(wrong)
    with pytest.raises(ValueError, match="size: expected at least 1"):
        TokenIds(0)


def test_the_folder_of_a_tokenizer_is_refused_by_the_name_of_its_file(tmp_path):
    BPETokenizer.train(["a text"], 256).save(tmp_path)
    with pytest.raises(ValueError, match=r"got a folder; give .*/tokenizer\.json"):
        BPETokenizer.from_file(tmp_path)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TokenIds(99)])
def test_lanes_are_decoded_one_by_one(tokenizer):
    """As generate returns them, and with the -1 that stream gives in place of a lane that has ended."""
    assert tokenizer.decode(torch.tensor([65, -1])) == tokenizer.decode([65])
    for lanes in ([torch.tensor([65, 66])], torch.tensor([[65, 66]]), np.array([[65, 66]]), [[65, 66]], 65):
        with pytest.raises(ValueError, match=r"tokens: expected the ids of one text .* of several lanes decode each"):
            tokenizer.decode(lanes)


def test_a_bpe_below_256_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 256, for every byte is a token, got 255"):
        BPETokenizer.train(CORPUS, 255)


def test_without_the_library_the_error_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "tokenizer.json").touch()
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tokenizers"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'memformer-replay\[bpe\]'"):
        BPETokenizer.train(CORPUS, 300)
    with pytest.raises(ImportError, match=r"pip install 'memformer-replay\[bpe\]'"):
        BPETokenizer.from_file(tmp_path / "tokenizer.json")


# --- Long texts, in pieces


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PARTS = ["a", "the", "The ", " memory", "read.", "\n", "\n\n", "\r\n", " ", "  ", "\t", " \n ", "é", "e\u0301", "🙂",
         "中文", "中", "1", "12345", "...", "'s", "'ll", "<|end|>", "\u00a0", "\u2028", "ﬁ", "ab", "aaaa",
         "    "]  # fmt: skip
STYLES = ["bpe", "gpt2", "llama3", "qwen", "llama2", "t5", "metaspace", "bert"]


def styled(style):
    """A tokenizer whose normalizer and pre-tokenizer are those of a published one, with a few merges of its own."""
    library = pytest.importorskip("tokenizers")
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = [" ".join(PARTS), "".join(PARTS) * 3, *CORPUS]
    if style == "bpe":
        return BPETokenizer.train(texts, 300)
    split = {"llama3": LLAMA3, "qwen": QWEN}.get(style)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    characters = sorted(set("".join(texts)) | {"▁"})
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    made = library.Tokenizer(models.BPE(ignore_merges=style == "llama3"))
    if style == "gpt2":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif split is not None:
        if style == "qwen":
            made.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), byte_level])
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    elif style in ("llama2", "metaspace"):
        trainer = trainers.BpeTrainer(vocab_size=150, initial_alphabet=characters, show_progress=False)
        if style == "llama2":  # no pre-tokenizer at all: a text is one word
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif style == "t5":
        made = library.Tokenizer(models.Unigram())
        made.normalizer = normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.Replace(Regex(r"\s"), " "),
                normalizers.Strip(left=False),
                normalizers.Replace(Regex(" {2,}"), "▁"),
            ]
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(vocab_size=150, initial_alphabet=characters, show_progress=False)
    else:
        made = library.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=250, initial_alphabet=characters, special_tokens=["[UNK]"], show_progress=False
        )
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(["<|end|>"])
    return BPETokenizer(made)


@pytest.fixture(scope="module", params=STYLES)
def style(request):
    return request.param, styled(request.param)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("memformer.data.pieces.BLOCK", 400)
    monkeypatch.setattr("memformer.data.pieces.OVERLAP", 160)


def whole(tokenizer, text):
    return tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
def test_pieces_of_a_text_are_the_whole(style, small_blocks, seed, parts, cuts):
    """Odd white space, no newline at all, half characters between the parts: whatever the tokenizer is made of."""
    name, tokenizer = style
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(parts, 900))
    expected = whole(tokenizer, text)
    if tokenizer._unknown is not None and tokenizer._unknown in expected:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a cut that came before that character
            with pytest.raises(ValueError, match="no token for"):
                tokenizer.encode(text)
        return
    raw = text.encode()
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pieces = list(tokenizer.encode_pieces(raw[a:b] for a, b in itertools.pairwise(edges)))
        assert np.concatenate(pieces).tolist() == tokenizer.encode(text).tolist()
    if caught:  # then nobody claims it; a byte-level one never needs to
        assert name in ("llama2", "metaspace", "t5", "bert")
    else:
        assert np.concatenate(pieces).tolist() == expected, name


def test_a_word_without_end_is_cut_with_a_warning(small_blocks):
    """The best path of a unigram model through a word is that of the whole word: memory is bounded, and it is said."""
    tokenizer = styled("t5")
    longest, encode = 0, tokenizer._encode

    def watched(text):
        nonlocal longest
        longest = max(longest, len(text))
        return encode(text)

    tokenizer._encode = watched
    text = "a" * 10_001
    with pytest.warns(UserWarning, match=r"cut at character [\d,]+, where this tokenizer may give other tokens"):
        ids = tokenizer.encode(text)
    assert longest <= 5 * 400
    assert abs(len(ids) - len(whole(tokenizer, text))) < 100


def test_no_file_is_encoded_in_one_call(small_blocks, style):
    """Neither a text of many lines nor one of a single line, as it was with a Sequence of pre-tokenizers."""
    _, tokenizer = style
    seen, encode = [], tokenizer._encode
    tokenizer._encode = lambda text: seen.append(len(text)) or encode(text)
    try:
        for text in ("one line of it\n" * 2000, "the memory " * 2000):
            assert np.array_equal(tokenizer.encode(text), whole(tokenizer, text))
    finally:
        del tokenizer._encode
    assert max(seen) <= 500


def test_two_newlines_at_a_cut_are_the_tokens_of_the_whole(monkeypatch):
    """GPT-2's expression gives a newline before a word a token of its own, so a cut behind two of them was wrong."""
    monkeypatch.setattr("memformer.data.pieces.BLOCK", 400)
    monkeypatch.setattr("memformer.data.pieces.OVERLAP", 160)
    tokenizer, text = BPETokenizer.train(["\n\n" * 50, "a\n\nb" * 30], 270), "a line\n\n" * 400
    assert tokenizer.encode(text).tolist() == whole(tokenizer, text)


# --- What comes in


def test_wrong_types_are_refused_by_a_sentence(bpe, tmp_path):
    text = "expected str or bytes, got int"
    for call, message in [
        (lambda: bpe.encode(5), text),
        (lambda: ByteTokenizer().encode(5), text),
        (
            lambda: BPETokenizer.train("one text", 300),
            r"texts: expected several, such as \[text\], got one of type str",
        ),
        (lambda: BPETokenizer.train([5], 300), text),
        (lambda: BPETokenizer.train(CORPUS, "300"), "size: expected a whole number of .* got '300'"),
        (lambda: BPETokenizer.train(CORPUS, 300.0), "size: expected a whole number of .* got 300.0"),
        (lambda: TokenIds(True), "size: expected at least 1 token, got True"),
        (lambda: BPETokenizer("tokenizer.json"), r"expected a tokenizers\.Tokenizer, got str; from_file reads"),
        (lambda: BPETokenizer.from_file(5), "path: expected a path, got 5"),
        (lambda: BPETokenizer.from_file(tmp_path), "expected a tokenizer.json, got a folder"),
        (lambda: load_tokenizer(5), "folder: expected a path, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    tokenizers = pytest.importorskip("tokenizers")
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "empty.json"))
    with pytest.raises(ValueError, match=r"empty\.json: tokenizer: expected one with a vocabulary, got an empty one"):
        BPETokenizer.from_file(str(tmp_path / "empty.json"))


def test_numpy_integers_are_sizes(tmp_path):
    assert BPETokenizer.train(CORPUS, np.int64(300)).ordinary == 300
    TokenIds(np.uint16(300)).save(tmp_path)
    assert load_tokenizer(tmp_path).ordinary == 300


def test_a_fingerprint_says_whether_two_tokenizers_are_one(tokenizer, bpe, tmp_path):
    tokenizer.save(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)
    others = [ByteTokenizer(), TokenIds(256), TokenIds(300), bpe, BPETokenizer.train(CORPUS, 299), styled("gpt2")]
    assert len({tokenizer_fingerprint(other) for other in others}) == len(others)
