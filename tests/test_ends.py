"""Where a document ends is one more target, and what a model can write: then its text ends."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from helpers import lively, tiny, training_settings
from memformer import Memformer, MemoryState
from memformer.cli import main
from memformer.data import (
    BPETokenizer,
    ByteTokenizer,
    Document,
    Lanes,
    Mixture,
    TokenIds,
    encode_documents,
    held_out_split,
    load_tokenizer,
    read_documents,
)
from memformer.data.documents import limited
from memformer.evaluation import evaluate
from memformer.generation import Stream
from memformer.settings import TrainingConfig, read_saved
from memformer.training import Run, checkpoints

BYTES = ByteTokenizer().with_end()
END = BYTES.start


def lists(documents, tokenizer):
    return [tokens[:].tolist() for tokens in encode_documents(documents, tokenizer)]


# --- Tokenizers


def test_a_tokenizer_has_an_end_where_it_is_asked_for(tmp_path):
    plain = ByteTokenizer()
    assert plain.end is None
    assert (BYTES.end, BYTES.special, BYTES.vocabulary) == (plain.start, plain.special, plain.vocabulary)
    assert TokenIds(7).with_end().end == 7
    assert BYTES.decode([97, END]) == "a"
    for tokenizer in (plain, BYTES):
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).end == tokenizer.end


def test_a_bpe_with_an_end_is_the_same_otherwise(tmp_path):
    pytest.importorskip("tokenizers")
    plain = BPETokenizer.train(["the cat and the dog "] * 9, 270)
    ending = plain.with_end()
    assert (plain.end, ending.end) == (None, plain.start)
    ending.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.end == plain.start
    assert loaded.encode("the dog").tolist() == plain.encode("the dog").tolist()
    assert lists([Document("a", b"the dog")], loaded) == [[*plain.encode("the dog").tolist(), plain.start]]


def test_a_tokenizer_that_was_saved_before_has_no_end(tmp_path):
    ByteTokenizer().save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["end"]
    file.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).end is None
    file.write_text(json.dumps({**config, "end": 3}))
    with pytest.raises(ValueError, match="end: expected null, or 256, which starts the next document, got 3"):
        load_tokenizer(tmp_path)


# --- Documents


def test_whole_documents_end():
    text = [Document("a", b"ab"), Document("b", "\u00e9".encode())]
    assert lists(text, BYTES) == [[97, 98, END], [195, 169, END]]
    assert lists(text, ByteTokenizer()) == [[97, 98], [195, 169]]
    assert lists([Document("ids", np.array([3, 1], np.uint8), text=False)], TokenIds(300).with_end()) == [[3, 1, 300]]


def test_the_beginning_of_a_document_does_not_end():
    document = Document("a", b"abcdef")
    assert lists([document.part(0, 3), document.part(3, 6), document.beginning(4), document.beginning(6)], BYTES) == [
        [97, 98, 99], [100, 101, 102, END], [97, 98, 99, 100], [97, 98, 99, 100, 101, 102, END],
    ]  # fmt: skip
    ((beginning,), (rest,)) = held_out_split([Document("a", b"x" * 96)], 48)
    assert lists([beginning, rest], BYTES) == [[120] * 94, [120, 120, END]]
    assert lists([beginning.part(0, 94)], BYTES) == [[120] * 94]
    assert lists(limited([document, document], 8), BYTES) == [[97, 98, 99, 100, 101, 102, END], [97, 98]]


def test_an_end_takes_the_place_of_a_separator(tmp_path):
    np.array([5, 6, 0, 7, 0, 8, 9], np.uint16).tofile(tmp_path / "a.bin")
    documents = read_documents([tmp_path / "a.bin"], separator=0)
    assert lists(documents, TokenIds(10).with_end()) == [[5, 6, 10], [7, 10], [8, 9, 10]]


def test_an_end_is_appended_without_reading(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "\u00e9!"}) + "\n")
    documents = encode_documents(read_documents([tmp_path]), BYTES)
    assert list(map(len, documents)) == [101, 4]
    (tmp_path / "a.txt").write_text("b" * 100)
    text = documents[0]
    assert np.issubdtype(text.dtype, np.integer)
    assert text[98:].tolist() == text[98:101].tolist() == text[-3:].tolist() == [98, 98, END]
    assert text[100:].tolist() == [END]
    assert text[101:].tolist() == text[3:2].tolist() == []
    assert text[97:100].dtype == text[97:].dtype == text.dtype
    assert text[96::2].tolist() == [98, 98, END]
    assert text[::-50].tolist() == [END, 98, 98]
    assert documents[1][:].tolist() == [195, 169, 33, END]
    assert [tokens[-1:].tolist() for tokens in documents[:1]] == [[END]]


@pytest.mark.parametrize("odds", [None, (0.4, 0.3, 0.3), (0, 1, 1)])
def test_an_end_is_the_last_target_and_never_a_source(odds):
    documents = encode_documents([Document(str(n), b"x" * n) for n in (64, 7, 8, 1, 40)], BYTES)
    objectives = odds and Mixture(BYTES, **dict(zip(("continuation", "infilling", "recall"), odds, strict=True)))
    stream = Lanes(documents, lanes=3, length=8, start=END, epochs=2, seed=1, objectives=objectives, spread=True)
    assert stream.stretches > 5
    ends = 0
    for segment in stream:
        fresh = segment.reset & segment.src_mask.sum(1).eq(1)
        assert not ((segment.src == END) & segment.src_mask)[~fresh].any()
        targets = (segment.tgt[:, 1:] == END) & segment.tgt_mask[:, 1:]
        last = segment.tgt_mask[:, 1:].sum(1) - 1
        assert not targets.sum(1).gt(1).any()
        assert (targets.nonzero()[:, 1] == last[targets.any(1)]).all()
        ends += int(targets.sum())
    if odds is None:
        assert ends == 10


# --- Evaluation


def test_an_end_is_a_target_that_is_counted():
    model = tiny(enc_num_tokens=260, dec_num_tokens=260)
    documents = [Document(str(n), b"memory " * n) for n in (1, 3, 6)]
    size = sum(map(len, documents))
    plain, ending = (evaluate(model, documents, tokenizer) for tokenizer in (ByteTokenizer(), BYTES))
    assert (plain.tokens, ending.tokens) == (size, size + 3)
    expected = 0.0
    for document in documents:
        stream = Lanes([[*bytes(document), END]], lanes=1, length=model.config.segment_length, start=END, epochs=1)
        memory = None
        for segment in stream:
            _, memory, loss = model.eval()(segment.src, segment.tgt, memory, segment.src_mask, segment.tgt_mask)
            expected += float(loss.detach()) * int(segment.tgt_mask[:, 1:].sum())
    assert ending.loss_nats * ending.tokens == pytest.approx(expected, rel=1e-6)
    assert ending.bits_per_byte == pytest.approx(expected / math.log(2) / size, rel=1e-6)


# --- Generation


def drawn(model, **given_):
    """The tokens of five lanes that may end, and the state after them."""
    prompt = [torch.tensor([i, 2, 3, 4][:i], dtype=torch.int64) for i in range(5)]
    generator = torch.Generator().manual_seed(0)
    start = model.config.enc_num_tokens - 1
    return model.generate(prompt, 40, start=start, generator=generator, stop=[start], **given_)


def test_a_lane_ends_with_the_start_token_where_that_stops():
    model = lively(0)
    start = model.config.enc_num_tokens - 1
    tokens, state = drawn(model)
    ended = [len(lane) < 40 for lane in tokens]
    assert any(ended)
    for i, lane in enumerate(tokens):
        assert (lane == start).sum() == ended[i]
        assert not ended[i] or lane[-1] == start
        assert int(state.position[i]) == (0 if ended[i] else min(i, 4) + 40)
    new = MemoryState.new(1, state.length, start, state.memory[0])
    again = state.select(torch.tensor(ended))
    for name in ("memory", "segment", "pending"):
        assert getattr(again, name).equal(getattr(new, name).expand_as(getattr(again, name))), name
    # Without the stop no text ends; with it, the other special tokens are named as ever.
    plain = model.generate(torch.tensor([[1]] * 5), 40, start=start).tokens
    assert not torch.cat(plain).eq(start).any()
    assert torch.cat(drawn(model, never=[start, 3]).tokens).eq(start).any()


def test_a_lane_that_ended_goes_on_with_a_new_document():
    model = lively(0)
    start = model.config.enc_num_tokens - 1
    tokens, state = drawn(model)
    lane = next(i for i, found in enumerate(tokens) if len(found) < 40)
    goes_on = model.generate(None, 9, state=state.select([lane]), temperature=0).tokens[0]
    assert goes_on.equal(model.generate(torch.zeros(1, 0, dtype=torch.int64), 9, start=start, temperature=0).tokens[0])


def test_a_stream_ends_and_says_so():
    model = lively(0)
    start = model.config.enc_num_tokens - 1
    stream = model.stream(
        torch.tensor([[1], [2]]), 200, start=start, stop=[start], generator=torch.Generator().manual_seed(1)
    )
    steps = torch.stack(list(stream))
    assert len(steps) < 200
    assert (steps == start).sum(0).tolist() == [1, 1]
    assert stream.state.position.tolist() == [0, 0]


def test_beams_end_too():
    model = lively(4)
    start = model.config.enc_num_tokens - 1
    prompt = torch.tensor([[1], [2], [3]])
    tokens, state = model.generate(prompt, 30, start=start, beams=4, stop=[start], length_penalty=0.0)
    ended = [lane[-1].item() == start for lane in tokens]
    assert all(ended)
    assert [int(p) == 0 for p in state.position] == ended
    # The likeliest text of at most one token, by hand.
    tokens, _ = model.generate(prompt[:1], 1, start=start, beams=4, stop=[start])
    logits = model.next_logits(*(lambda s: (s, model.open(s)))(model.read(prompt[:1], start=start)))
    assert tokens[0].tolist() == [int(logits[0].argmax())]


def test_the_end_is_no_repetition():
    """The state is filled up with the start token, which would make that the most repeated of all."""
    model = lively(0)
    start = model.config.enc_num_tokens - 1
    state = model.read(torch.tensor([[1, 2]]), start=start)
    with torch.no_grad():
        logits = model.next_logits(state, model.open(state))
        others = [token for token in range(start) if token not in (1, 2)]
        counts = torch.zeros(2)
        for i, penalty in enumerate((1.0, 2.0)):
            how = dict(stop=[start], never=others, repetition_penalty=penalty)
            many, generator = state.select([0] * 2000), torch.Generator().manual_seed(0)
            counts[i] = sum(int(x) == start for x in model.generate(None, 1, state=many, generator=generator, **how)[0])
    expected = [
        float(torch.stack([x[0, 1], x[0, 2], logits[0, start]]).softmax(0)[2])
        for x in (logits, torch.where(logits > 0, logits / 2, logits * 2))
    ]
    assert (counts / 2000 - torch.tensor(expected)).abs().max() < 0.05


# --- Training and the command line


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run on short texts of one kind, until it knows them."""
    folder = tmp_path_factory.mktemp("short")
    lines = [json.dumps({"text": "ab" * n + "."}) for n in (1, 2) for _ in range(60)]
    (folder / "short.jsonl").write_text("\n".join(lines) + "\n")
    settings = training_settings(
        data=(folder / "short.jsonl",), out=folder / "run", steps=60, dim=16, slots=2, enc_depth=1, dec_depth=1,
        heads=2, lanes=8, segment_length=8, horizon=2, warmup=5, learning_rate=3e-2, device="cpu",
    )  # fmt: skip
    list(Run(settings).train())
    return settings


def test_a_run_learns_where_texts_end(short):
    folder = checkpoints.newest(short.out)
    assert load_tokenizer(folder).end == END
    model = Memformer.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = model.generate([torch.tensor([97, 98])] * 20, 50, start=END, stop=[END], generator=generator).tokens
    written = ["ab" + BYTES.decode(lane.tolist()) for lane in tokens]
    assert all(lane[-1] == END for lane in tokens)
    assert sum(text in ("ab.", "abab.") for text in written) >= 18


def test_generate_stops_at_the_end(short, capsys):
    def generate(*more):
        command = ["generate", "--checkpoint", str(short.out), "--max-new-tokens", "50", "--temperature", "0"]
        assert main([*command, *more]) == 0
        return capsys.readouterr().out

    assert generate("--prompt", "abab") == "abab.\n"
    state = short.out.parent / "talk.state"
    assert generate("--prompt", "abab", "--state", str(state)) == "abab.\n"
    assert generate("--prompt", "abab", "--state", str(state)) == "abab.\n"
    assert int(MemoryState.load(state, Memformer.from_pretrained(checkpoints.newest(short.out))).position) == 0
    assert generate("--prompt", "ab", "--max-new-tokens", "1") in ("aba\n", "ab.\n")


def test_a_run_without_ends_writes_on(short, tmp_path, capsys):
    documents = dataclasses.replace(short.documents, end=False)
    list(Run(dataclasses.replace(short, out=tmp_path / "run", steps=1, documents=documents)).train())
    folder = checkpoints.newest(tmp_path / "run")
    assert load_tokenizer(folder).end is None
    stop = []
    heard = Stream.__next__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stream, "__next__", lambda stream: (token := heard(stream), stop.append(int(token)))[0])
        assert main(["generate", "--checkpoint", str(folder), "--prompt", "ab", "--max-new-tokens", "200"]) == 0
    assert len(stop) == 200
    assert END not in stop


def test_a_run_that_was_saved_before_learns_no_ends():
    assert TrainingConfig().documents.end
    assert not read_saved({}).documents.end
