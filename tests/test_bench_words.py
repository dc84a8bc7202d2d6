"""On which tokens a memory helps: kinds of words, by an independent reading."""

import json

import numpy as np
import pytest
import torch

from memformer.bench.text import TextBenchmark, _corpus, held_out
from memformer.bench.words import KINDS, word_kinds, words_of
from memformer.cli import main
from test_bench_text import LENGTH, ONE, VOCABULARY, Counter, documents, small


def named(text: str, length: int, known: str = "") -> list[str]:
    kinds = word_kinds(text.encode(), np.ones(len(text.encode()), int), words_of([known.encode()]), length)
    return [KINDS[kind] for kind in kinds]


def test_words_stand_near_or_far_or_for_the_first_time():
    text = "Puck, oh Puck! ....... Puck oh"
    found = named(text, 8, known="oh no")
    expected = ["between words"] * len(text)
    for begin, end, kind in (
        (0, 4, "new, first"),
        (6, 8, "known, first"),
        (9, 13, "new, near"),  # begins in segment 1, and 0 had it
        (23, 27, "new, near"),  # begins in segment 2, and 1 had it
        (28, 30, "known, far"),  # begins in segment 3, and last stood in 0
    ):
        expected[begin:end] = [kind] * (end - begin)
    assert found == expected


def test_words_are_taken_as_they_are_written():
    assert words_of([b"it's x_1 2nd", "Häuser".encode()]) == {b"it", b"s", b"x_1", b"nd", "Häuser".encode()}
    assert named("a A", 8) == ["new, first", "between words", "new, first"]


@pytest.mark.parametrize("seed", range(5))
def test_kinds_of_random_texts(seed):
    rng = np.random.default_rng(seed)
    words = [b"a ", b"bb.", b"ccc ", b"d1 ", b"a", b". "]
    text = b"".join(words[i] for i in rng.integers(0, len(words), 60))
    sizes = []
    while sum(sizes) < len(text):
        sizes.append(min(int(rng.integers(1, 4)), len(text) - sum(sizes)))
    length, known = int(rng.integers(1, 6)), {b"a", b"ccc"}
    segment_of_byte = [token // length for token, size in enumerate(sizes) for _ in range(size)]
    kinds, at, seen = [], 0, {}
    while at < len(text):  # letter by letter, as one reads
        end = at
        while end < len(text) and (text[end : end + 1].isalpha() or (end > at and text[end : end + 1].isdigit())):
            end += 1
        if end == at:
            kinds.append("between words")
            at += 1
            continue
        word = text[at:end]
        segment = segment_of_byte[at]
        where = "first" if word not in seen else "near" if segment - seen[word] < 2 else "far"
        kinds += [f"{'known' if word in known else 'new'}, {where}"] * len(word)
        seen[word], at = segment, end
    expected = [kinds[end - 1] for end in np.cumsum(sizes)]
    assert [KINDS[kind] for kind in word_kinds(text, np.array(sizes), known, length)] == expected


@pytest.mark.parametrize("memory", [True, False])
def test_bits_are_counted_by_kind(memory):
    texts = documents(150, 4, 5, 41, 8, 3, 70)
    sizes = torch.arange(VOCABULARY, dtype=torch.float64)
    kinds = [text.long() % len(KINDS) for text in texts]
    score = held_out(Counter(), texts, sizes, LENGTH, kinds=kinds, lanes=3, memory=memory)
    counted = torch.cat([text[LENGTH:] for text in texts]).long()
    for kind, (count, bits) in enumerate(score.by_kind):
        of_kind = counted[counted % len(KINDS) == kind]
        assert count == int(sizes[of_kind].sum())
        assert bits == pytest.approx(len(of_kind) * np.log2(VOCABULARY))
    assert held_out(Counter(), texts, sizes, LENGTH, lanes=3, memory=memory).by_kind == ()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_held_out_documents_have_kinds(monkeypatch, tokenizer):
    if tokenizer == "bpe":
        pytest.importorskip("tokenizers")
    small(monkeypatch)
    sizes = {"bpe_size": 300} if tokenizer == "bpe" else {}
    corpus = _corpus(TextBenchmark(tokenizer=tokenizer, **sizes))
    assert [kinds.shape for kinds in corpus.kinds] == [ids.shape for ids in corpus.held_out]
    found = {KINDS[kind] for kinds in corpus.kinds for kind in kinds.tolist()}
    assert {"known, first", "known, near"} <= found


def test_the_report_tells_kinds_apart(monkeypatch, capsys, tmp_path):
    small(monkeypatch)
    out = tmp_path / "runs.json"
    command = [*ONE, "--out", str(out)]
    assert main(command) == 0
    report = capsys.readouterr().out
    table = report[report.index("by words") :].splitlines()
    cells = [[float(cell.replace(",", "")) if cell != "-" else 0.0 for cell in row[20:].split()] for row in table[3:6]]
    assert [row[:20].strip() for row in table[3:6]] == ["bytes", "horizon 2", "without memory"]
    held = json.loads(out.read_text())
    result = held["runs"][0]["result"]
    assert sum(cells[0]) == result["bytes"]
    for name, row in (("", cells[1]), ("_without_memory", cells[2])):
        bits = sum(count * each for count, each in zip(cells[0], row, strict=True)) / sum(cells[0])
        assert bits == pytest.approx(result["bits_per_byte" + name], abs=1e-3)
    for name in ("by_kind", "by_kind_without_memory"):
        del result[name]
    out.write_text(json.dumps(held))
    assert main(command) == 0
    assert "by words" not in capsys.readouterr().out, "trials from before cannot tell"


def test_differences_are_told_seed_by_seed(monkeypatch, capsys, tmp_path):
    small(monkeypatch)
    out = tmp_path / "runs.json"
    command = [*ONE, "--horizons", "2", "1", "--seeds", "0", "1", "--out", str(out)]
    assert main(command) == 0
    table = capsys.readouterr().out.partition("more than horizon 2, seed by seed: mean (least-most)\n")[2].splitlines()
    runs = {
        (held["run"]["variant"][2], held["run"]["seed"]): held["result"] for held in json.loads(out.read_text())["runs"]
    }
    assert table[0].split() == ["horizon", "1"]
    shown = 0
    for place, kind in enumerate(KINDS):
        bits = [[runs[horizon, seed]["by_kind"][place] for horizon in (1, 2)] for seed in (0, 1)]
        if not bits[0][0][0]:
            continue
        of_seeds = [one[1] / one[0] - other[1] / other[0] for one, other in bits]
        shown += 1
        said = f"{sum(of_seeds) / 2:.3f} ({min(of_seeds):.3f}-{max(of_seeds):.3f})"
        assert [row[20:].strip() for row in table if row.startswith(f"{kind:20}")] == [said]
    assert shown > 2
