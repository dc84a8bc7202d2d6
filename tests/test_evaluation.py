"""Evaluation: every token of every document counts once, whatever is read beside it, by its depth."""

import lzma
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from memformer import Memformer
from memformer.data import BPETokenizer, ByteTokenizer, Document, TokenIds, xz_bits_per_byte
from memformer.evaluation import evaluate

WORDS = b"the memory of a segment is read by every layer and written once, so that what was seen is not forgotten. "
TOKENIZER = ByteTokenizer()


@pytest.fixture
def model():
    return Memformer(
        dim=16, num_memory_slots=3, enc_num_tokens=TOKENIZER.vocabulary, enc_max_seq_len=8, enc_depth=1, enc_heads=2,
        dec_num_tokens=TOKENIZER.vocabulary, dec_max_seq_len=9, dec_depth=1, dec_heads=2, mem_update_attn_heads=2,
        dec_overlap=3, dropout=0.3,
    )  # fmt: skip


def one_by_one(model, documents, memory_on):
    """Nats and tokens by segment, each document alone through the model's own call."""
    model.eval()
    found = {}
    start = torch.tensor([[TOKENIZER.start]])
    for document in documents:
        memory, source = None, start
        for i, target in enumerate(torch.tensor([list(bytes(document))]).split(8, 1), start=1):
            with torch.no_grad():
                _, memory, loss = model(source, torch.cat([start, target], 1), memory if memory_on else None)
            nats, tokens = found.get(i, (0.0, 0))
            found[i], source = (nats + float(loss) * target.shape[1], tokens + target.shape[1]), target
    return found


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_documents_are_read_whole(model, lanes, memory):
    documents = [Document(str(n), (WORDS * 2)[:n]) for n in (1, 8, 21, 60, 200)]
    result = evaluate(model, documents, TOKENIZER, lanes=lanes, memory=memory, step=7)
    found = one_by_one(model, documents, memory)
    nats, tokens = (sum(part) for part in zip(*found.values(), strict=True))
    assert (result.step, result.tokens, result.documents) == (7, 290, 5)
    assert result.loss_nats == pytest.approx(nats / tokens, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(nats / tokens / math.log(2), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert [(d.first, d.last) for d in result.by_depth] == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    for depth in result.by_depth:
        inside = [found[i] for i in found if depth.first <= i <= depth.last]
        nats, tokens = (sum(part) for part in zip(*inside, strict=True))
        assert depth.tokens == tokens
        assert depth.bits_per_token == pytest.approx(nats / tokens / math.log(2), rel=1e-5)


def test_memory_makes_a_difference_from_the_third_segment_on(model):
    """The second one sees its source anyway, and the memory after the start token alone."""
    documents = [Document("a", WORDS)]
    on, off = (evaluate(model, documents, TOKENIZER, memory=memory).by_depth for memory in (True, False))
    assert_close(on[0], off[0])
    assert on[2].bits_per_token != off[2].bits_per_token


def test_bits_per_byte_needs_text(model):
    ids = Document("ids", torch.arange(50).numpy(), text=False)
    with pytest.raises(ValueError, match="model: expected enc_num_tokens of 104"):
        evaluate(model, [ids], TokenIds(100))
    assert evaluate(model, [ids], TokenIds(256)).bits_per_byte is None


def test_ids_of_a_byte_level_vocabulary_have_bits_per_byte(model):
    """Those of a train.bin beside its tokenizer.json. Its <|endoftext|> is no text, but costs bits."""
    library = pytest.importorskip("tokenizers")
    letters = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*letters[:253], "th"])}
    made = library.Tokenizer(library.models.BPE(vocabulary, [("t", "h")]))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<|endoftext|>"])
    made.add_tokens(["naïve"])
    bpe = BPETokenizer(made)
    assert bpe.vocabulary == TOKENIZER.vocabulary
    ids = np.append(bpe.encode("the path"), [bpe.ordinary - 2, bpe.ordinary - 2])
    result = evaluate(model, [Document("ids", ids, text=False)], bpe)
    assert result.tokens == 8
    assert result.bits_per_byte == pytest.approx(result.bits_per_token * 8 / len(b"the path"), rel=1e-6)


def test_the_models_mode_is_kept_and_dropout_is_off(model):
    documents = [Document("a", WORDS)]
    model.train()
    first = evaluate(model, documents, TOKENIZER)
    assert model.training
    assert evaluate(model, documents, TOKENIZER).loss_nats == first.loss_nats
    model.eval()
    evaluate(model, documents, TOKENIZER)
    assert not model.training
    model.train()
    model.encoder.eval()  # as one that is frozen
    evaluate(model, documents, TOKENIZER)
    assert model.training
    assert not any(part.training for part in model.encoder.modules())


class Counted:
    """Text that is made when it is read, and remembers how much was asked for at once."""

    dtype = np.dtype(np.uint8)

    def __init__(self, size):
        self.size, self.most, self.all = size, 0, 0

    def __len__(self):
        return self.size

    def __getitem__(self, place):
        start, stop, _ = place.indices(self.size)
        self.most, self.all = max(self.most, stop - start), self.all + stop - start
        return (np.arange(start, stop) * 7919 % 251).astype(np.uint8)

    def part(self, start, stop):
        return self[start:stop]


def test_xz_reads_pieces_and_no_more_than_it_may():
    content = Counted(5_000_000)
    documents = [Document("a", b"abc" * 100), Document("b", content)]
    whole = b"abc" * 100 + content[:2_000_000].tobytes()
    content.most = content.all = 0
    expected = 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole)
    assert xz_bits_per_byte(documents, len(whole)) == pytest.approx(expected, rel=1e-3)
    assert content.all == 2_000_000
    assert content.most <= 1 << 20
    assert (
        xz_bits_per_byte([b"abc" * 100]) == 8 * len(lzma.compress(b"abc" * 100, preset=9 | lzma.PRESET_EXTREME)) / 300
    )
    with pytest.raises(ValueError, match="held_out: expected text, got none"):
        xz_bits_per_byte([])


def test_progress_counts_every_token_once(model):
    documents, seen = [Document(str(n), (WORDS * 2)[:n]) for n in (1, 8, 21, 60, 200)], []
    evaluate(model, documents, TOKENIZER, lanes=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (290, 290)
    assert seen == sorted(seen)


def test_mistakes(model):
    with pytest.raises(ValueError, match="documents: expected at least one, got none"):
        evaluate(model, [], TOKENIZER)
    with pytest.raises(ValueError, match="documents: 'z', at index 1, is empty; leave it out"):
        evaluate(model, [Document("a", b"hello"), Document("z", b"")], TOKENIZER)
    with pytest.raises(ValueError, match="lanes: expected at least 1, got 0"):
        evaluate(model, [Document("a", b"a")], TOKENIZER, lanes=0)


def test_a_segment_fits_encoder_and_decoder(model):
    assert model.config.segment_length == 8
