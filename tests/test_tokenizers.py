"""Tokenizers: the text comes back, special ids lie behind the ordinary ones, a saved one is the same one."""

import builtins
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer.data import BPETokenizer, ByteTokenizer, TokenIds, Tokenizer, load_tokenizer

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


def test_a_long_text_is_encoded_in_blocks(bpe, monkeypatch):
    monkeypatch.setattr("memformer.data.tokenizers._BLOCK", 10)
    text = "a line\nanother one that is longer than a block\n\n  and the end"
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode("").tolist() == []


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
        (json.dumps({**saved, "kind": "morse"}), "expected a tokenizer of bytes, bpe or ids, got 'morse'"),
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


def test_token_ids_are_shown_as_numbers_and_take_no_text():
    ids = TokenIds(10)
    assert ids.decode([3, ids.start, 9]) == "3 9"
    decoder = ids.decoder()
    assert "".join(decoder.decode([i]) for i in (3, ids.mask, 9)) + decoder.flush() == "3 9"
    with pytest.raises(ValueError, match="token ids without a text form"):
        ids.encode("text")
    with pytest.raises(ValueError, match="size: expected at least 1"):
        TokenIds(0)


def test_a_bpe_below_256_tokens_is_refused():
    with pytest.raises(ValueError, match="size: expected at least 256, for every byte is a token, got 255"):
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
