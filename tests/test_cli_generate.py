"""memformer generate as a user has it: text from anywhere, a memory in a file, one line for a mistake."""

from __future__ import annotations

import codecs
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from helpers import lively
from memformer.cli import main
from memformer.cli.generate import _last, _print
from memformer.data import BPETokenizer, ByteTokenizer, TokenIds, Tokenizer, decoder_behind
from memformer.model import Memformer
from memformer.state import MemoryState
from memformer.writing import Stream
from test_tokenizers import styled

GREEDY = ["--temperature", "0", "--top-p", "1"]


def save(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Memformer:
    """A checkpoint whose text is, for a model that learned nothing, varied."""
    sizes = dict(enc_num_tokens=tokenizer.vocabulary, dec_num_tokens=tokenizer.vocabulary)
    model = lively(seed, **sizes).float()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memformer:
    """The model in the folder ``run`` of the folder to work in. Nothing is piped in."""
    monkeypatch.chdir(tmp_path)
    return save(tmp_path / "run", ByteTokenizer())


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command; what it printed."""

    def run(*arguments: str) -> str:
        assert main(["generate", "--checkpoint", "run", "--max-new-tokens", "30", *arguments]) == 0
        return capsys.readouterr().out

    return run


@contextlib.contextmanager
def piped(text: str) -> Iterator[None]:
    """Standard input is a file with this text."""
    Path("piped").write_text(text)
    with Path("piped").open() as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        yield


def test_capturing_is_asked_for(generate: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "ab", *GREEDY, "--capture", "off") == generate("--prompt", "ab", *GREEDY)
    assert main(["generate", "--checkpoint", "run", "--prompt", "ab", "--capture", "on", "--device", "cpu"]) == 2
    assert "capture: expected a CUDA device, got cpu; leave capture 'on' out" in capsys.readouterr().err


def test_the_text_is_the_models(generate: Callable[..., str], model: Memformer) -> None:
    tokenizer = ByteTokenizer()
    prompt = torch.from_numpy(tokenizer.encode("For ever").astype("int64"))[None]
    tokens = model.generate(prompt, 30, start=tokenizer.start, never=tokenizer.special, temperature=0).tokens
    assert generate("--prompt", "For ever", *GREEDY) == "For ever" + tokenizer.decode(tokens[0]) + "\n"


def test_a_prompt_comes_from_a_flag_a_file_or_standard_input(generate: Callable[..., str]) -> None:
    text = "Once upon a time, "
    Path("text").write_text(text)
    expected = generate("--prompt", text).removeprefix(text)
    assert generate("--prompt-file", "text") == expected
    for flags in ([], ["--prompt-file", "-"]):
        with piped(text):
            assert generate(*flags) == expected


def test_a_byte_order_mark_is_no_part_of_a_prompt(generate: Callable[..., str]) -> None:
    """As it is none of the texts that are trained on."""
    expected = generate("--prompt", "Once").removeprefix("Once")
    Path("text").write_bytes(codecs.BOM_UTF8 + b"Once")
    assert generate("--prompt-file", "text") == expected
    with piped("\ufeffOnce"):
        assert generate() == expected
    with piped("\ufeffOnce\n"):
        spoken = generate("--interactive")
    assert spoken == generate("--prompt", "Once\n").removeprefix("Once\n")


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_refused_as_a_prompt_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, errors: str
) -> None:
    Path("piped").write_bytes(b"Who?\ncaf\xe9\n")
    with Path("piped").open(encoding="utf-8", errors=errors) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["generate", "--checkpoint", "run", "--interactive", "--max-new-tokens", "3"]) == 2
    assert "memformer: error: standard input: expected UTF-8 text (" in capsys.readouterr().err


def test_without_a_prompt_a_document_begins(generate: Callable[..., str]) -> None:
    assert generate() == generate("--prompt", "")


def test_the_seed_decides(generate: Callable[..., str]) -> None:
    assert generate("--seed", "1") == generate("--seed", "1") != generate("--seed", "2")


def test_a_state_goes_on(generate: Callable[..., str], model: Memformer) -> None:
    whole = generate("--prompt", "Long ago", *GREEDY, "--max-new-tokens", "37")
    first = generate("--prompt", "Long ago", *GREEDY, "--max-new-tokens", "20", "--state", "talk")
    assert int(MemoryState.load("talk", model).position) == 28
    second = generate(*GREEDY, "--max-new-tokens", "17", "--state", "talk")
    assert first.removesuffix("\n") + second == whole
    assert int(MemoryState.load("talk", model).position) == 45
    assert not list(Path().glob(".talk*"))


def test_the_memory_is_written_as_asked(
    generate: Callable[..., str], model: Memformer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sharper than in training: the text is that of a model written to so, and its states belong to it."""
    sharper, prompt = ["--write-temperature", "0.05", "--forgetting", "0"], "For ever and a day, or so they say. "
    model.set_writer(write_temperature=0.05, forgetting=0)
    tokenizer = ByteTokenizer()
    tokens = model.generate(
        torch.from_numpy(tokenizer.encode(prompt).astype("int64"))[None],
        30,
        start=tokenizer.start,
        never=tokenizer.special,
        temperature=0,
    ).tokens
    found = generate("--prompt", prompt, *GREEDY, *sharper, "--state", "sharp")
    assert found == prompt + tokenizer.decode(tokens[0]) + "\n"
    assert found != generate("--prompt", prompt, *GREEDY)
    assert len(generate(*GREEDY, *sharper, "--state", "sharp")) > 20, "a state goes on as it was written"
    assert main(["generate", "--checkpoint", "run", "--state", "sharp"]) == 2
    assert "sharp: written with another model: write_temperature 0.05 there, 0.25 here" in capsys.readouterr().err


def test_a_stream_that_goes_on_does_not_draw_the_same_again(generate: Callable[..., str], model: Memformer) -> None:
    # A model that knows nothing draws the same text from the same numbers.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained("run")
    assert generate("--state", "talk") != generate("--state", "talk")


def test_interactive_lines_share_one_memory(generate: Callable[..., str], model: Memformer) -> None:
    with piped("Who?\n\nWhy?\n"):
        spoken = generate("--interactive", *GREEDY, "--max-new-tokens", "8", "--state", "talk")
    answers = [
        generate(*prompt, *GREEDY, "--max-new-tokens", "8", "--state", "again").removeprefix("".join(prompt[1:]))
        for prompt in (["--prompt", "Who?\n"], ["--prompt", ""], ["--prompt", "Why?\n"])
    ]
    assert spoken == "".join(answers)
    talk, again = (MemoryState.load(name, model) for name in ("talk", "again"))
    assert torch.equal(talk.memory, again.memory)
    assert torch.equal(talk.pending, again.pending)


def test_a_stop_text_ends_it(generate: Callable[..., str]) -> None:
    text = generate("--prompt", "", *GREEDY).removesuffix("\n")
    stop = text[3:5]
    assert generate("--prompt", "", *GREEDY, "--stop", stop) == text[: text.index(stop) + 2] + "\n"


def test_of_several_stop_texts_the_first_to_come_ends_it(generate: Callable[..., str]) -> None:
    text = generate("--prompt", "", *GREEDY).removesuffix("\n")
    early, late = text[2:4], text[9:12]
    assert text.index(early) < text.index(late)
    expected = text[: text.index(early) + 2] + "\n"
    assert generate("--prompt", "", *GREEDY, "--stop", late, "--stop", early) == expected
    assert generate("--prompt", "", *GREEDY, "--stop", "~~~~", "--stop", early) == expected


def test_nothing_is_printed_after_a_stop_inside_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    """The token is read whole, and none after it."""
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(["the cat and the dog and the cow "] * 9, 300)
    ids = tokenizer.encode("the dog and the cat").tolist()
    texts = [tokenizer.decode([token]) for token in ids]
    assert " and" in texts
    tokens = iter(torch.tensor(ids)[:, None])
    _print(tokens, tokenizer.decoder(), ["no", "og a", "cat"])
    assert capsys.readouterr().out == "the dog a\n"
    assert len(list(tokens)) == len(ids) - texts.index(" and") - 1


def test_ids_stop_at_whole_ids(
    generate: Callable[..., str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(tmp_path / "run", TokenIds(30))
    ids = generate("--prompt", "3 7", *GREEDY).split()[2:]
    inside = next(i for i, word in enumerate(ids) if len(word) > 1 and word[1] not in ids[: i + 1])
    stop = ids[inside][1]
    expected = ids[: ids.index(stop) + 1] if stop in ids else ids
    assert generate("--prompt", "3 7", *GREEDY, "--stop", stop).split()[2:] == expected
    run = " ".join(ids[3:5])
    first = next(i for i in range(len(ids)) if ids[i : i + 2] == ids[3:5])
    assert generate("--prompt", "3 7", *GREEDY, "--stop", stop, "--stop", run).split()[2:] == ids[: first + 2]
    assert main(["generate", "--checkpoint", "run", "--stop", "the end"]) == 2
    assert "memformer: error: stop: this vocabulary is token ids without a text" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_obeys_nothing_that_a_model_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    """A young model of bytes writes any of them; a pipe gets just these."""
    tokenizer, text = ByteTokenizer(), "a\x1b[2J\x0eb\tc\r\nd\x7f"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    _print(iter(torch.from_numpy(tokenizer.encode(text).astype("int64"))[:, None]), tokenizer.decoder(), [])
    shown = "a\ufffd[2J\ufffdb\tc\nd\ufffd" if terminal else text
    assert capsys.readouterr().out == shown + "\n"


def test_spaces_between_a_prompt_and_what_follows(
    generate: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some vocabularies write a space with the word behind it, and drop it at a text's beginning."""
    library = pytest.importorskip("tokenizers")
    tokenizer = styled("metaspace")
    tokenizer._tokenizer.decoder = library.decoders.Metaspace(prepend_scheme="always")
    save(tmp_path / "run", tokenizer)
    wanted = iter(tokenizer.encode("a text with some words in it").tolist())
    ids = tokenizer.encode("a text").tolist()
    assert [next(wanted) for _ in ids] == ids
    monkeypatch.setattr(Stream, "__next__", lambda stream: torch.tensor([next(wanted)]))
    assert generate("--prompt", "a text") == "a text with some words in it\n"


def test_a_character_that_two_calls_share_is_shown_once(generate: Callable[..., str], tmp_path: Path) -> None:
    """The first shows half of it as U+FFFD, and has gone."""
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode("é€d").tolist()
    shown = [decoder_behind(tokenizer, tokens[:n]).decode(tokens[n:]) for n in range(len(tokens) + 1)]
    assert shown == ["é€d", "\ufffd€d", "€d", "\ufffd\ufffdd", "\ufffdd", "d", ""]


def test_the_last_tokens_of_a_state(model: Memformer) -> None:
    for count in (0, 1, model.config.enc_max_seq_len, 3 * model.config.enc_max_seq_len + 2):
        tokens = torch.arange(count)[None]
        state = model.stream(tokens, 1, start=256).state
        assert _last(state) == tokens[0, -len(_last(state)) :].tolist()
        assert len(_last(state)) >= min(count, model.config.enc_max_seq_len)


def test_any_tokenizer_of_a_checkpoint(generate: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    tokenizer = BPETokenizer.train(["the cat and the dog and the cow "] * 9, 280)
    model = save(tmp_path / "run", tokenizer)
    tokens = model.generate(
        torch.tensor([tokenizer.encode("the dog").tolist()]),
        30,
        start=tokenizer.start,
        never=tokenizer.special,
        temperature=0,
    ).tokens[0]
    assert generate("--prompt", "the dog", *GREEDY) == "the dog" + tokenizer.decode(tokens.tolist()) + "\n"
    save(tmp_path / "run", TokenIds(9))
    assert all(0 <= int(number) < 9 for number in generate().split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--max-new-tokens -1", "max_new_tokens: expected a whole number of at least 0, got -1"),
        ("--temperature -1", "temperature: expected a finite number of at least 0"),
        ("--top-p 0", "top_p: expected a share in (0, 1], got 0.0"),
        ("--top-p 1.5", "top_p: expected a share in (0, 1], got 1.5"),
        ("--top-k 0", "top_k: expected a whole number of at least 1, got 0"),
        ("--min-p 2", "min_p: expected a share in (0, 1], got 2.0"),
        ("--repetition-penalty 0", "repetition_penalty: expected a finite number above 0, got 0"),
        ("--prompt a --prompt-file text", "prompt: expected either --prompt or --prompt-file, got both"),
        ("--prompt-file nowhere", "nowhere"),
        ("--prompt-file latin", "latin: expected UTF-8 text"),
        ("--prompt \udcff", "prompt: expected UTF-8 text"),
        ("--state text", "text: truncated, or not a state file"),
        ("--state run", "run"),
        ("--state cut", "cut: truncated, or not a state file"),
        ("--state other", "other: written with another model: the same settings, other weights"),
        ("--state lanes", "state: expected one lane in lanes, got 2"),
        ("--state no/where", "no is not a folder"),
        ("--state closed/talk.state", "closed cannot be written to"),
        ("--checkpoint text", "text: no checkpoint there"),
    ],
)
def test_a_mistake_is_one_line_and_harms_no_file(
    model: Memformer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: str,
    message: str,
) -> None:
    Path("closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # root may write anywhere
    Path("text").write_text("Dear diary, ")
    Path("latin").write_bytes("caf\xe9".encode("latin-1"))
    start = ByteTokenizer().start
    other = save(tmp_path / "other-run", ByteTokenizer(), seed=1)
    other.read(torch.zeros(1, 7, dtype=torch.int64), start=start).save("other", other)
    model.read(torch.zeros(2, 7, dtype=torch.int64), start=start).save("lanes", model)
    Path("cut").write_bytes(Path("lanes").read_bytes()[:-1])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert main(["generate", "--checkpoint", "run", *arguments.split()]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.startswith("memformer: error: ")
    assert errors.count("\n") == 1
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


COMMAND = [sys.executable, "-m", "memformer", "generate", "--checkpoint", "run"]


def goes_on(model: Memformer, first: str, state: str) -> None:
    """The state is that of the text so far: the whole text, and at most a few tokens that were not read any more."""
    tokenizer = ByteTokenizer()
    prompt = torch.from_numpy(tokenizer.encode(first).astype("int64"))[None]
    saved = MemoryState.load(state, model)
    how = dict(start=tokenizer.start, never=tokenizer.special, temperature=0)
    again = model.generate(prompt, int(saved.position) - prompt.shape[1], **how).state
    assert torch.equal(again.pending, saved.pending)
    assert torch.equal(again.segment, saved.segment)
    assert torch.equal(again.memory, saved.memory)


def test_a_reader_that_leaves_ends_it_without_a_word_and_the_state_is_saved(model: Memformer) -> None:
    command = [*COMMAND, "--prompt", "Once", "--state", "talk", *GREEDY, "--stop", "~~~"]
    process = subprocess.Popen([*command, "--max-new-tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    goes_on(model, "Once", "talk")


@pytest.mark.parametrize("where", ["", ">&-", ">/dev/full"])
def test_no_terminal_breaks_the_output(model: Memformer, where: str) -> None:
    """The prompt has characters that ASCII lacks; the text goes to a pipe, nowhere, or to a full disk."""
    if where == ">/dev/full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = [*COMMAND, "--prompt", "caf\u00e9 \u2026", "--state", "talk", *GREEDY, "--max-new-tokens", "9"]
    shell = f"exec {shlex.join(command)} {where}"
    strict = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    done = subprocess.run(["bash", "-c", shell], capture_output=True, env=strict)
    assert done.returncode == (2 if "full" in where else 0), done.stderr
    assert done.stderr.count(b"\n") == ("full" in where)
    assert done.stdout.startswith(b"" if where else b"caf\\xe9 \\u2026")
    goes_on(model, "caf\u00e9 \u2026", "talk")


def test_ctrl_c_saves_what_was_written(model: Memformer) -> None:
    # Where the suite runs in the background of a shell SIGINT is ignored, and children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, "--state", "talk", "--prompt", "ever after", *GREEDY, "--max-new-tokens", "1000000000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.read(200).startswith(b"ever after")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.decode().strip() == "memformer: stopped; talk holds what was written so far"
    assert not list(Path().glob(".talk*"))
    goes_on(model, "ever after", "talk")


def test_ctrl_c_while_the_prompt_is_read_leaves_the_state_as_it_was(
    generate: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("--prompt", "Long ago", "--state", "talk")
    before = Path("talk").read_bytes()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("memformer.cli.generate.stream", interrupted)
    assert main(["generate", "--checkpoint", "run", "--state", "talk", "--prompt", "ever after"]) == 130
    assert capsys.readouterr().err.strip() == "memformer: stopped; talk is as it was saved last"
    assert Path("talk").read_bytes() == before
