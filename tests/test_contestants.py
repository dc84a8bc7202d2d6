"""All contestants under the same rules: what they see, what they carry, how large they are.

Those from other packages are tested where the environment says in which folders they are: MEMFORMER_RIVALS and
MEMFORMER_EARLIER.
"""

import dataclasses
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.rivals import Folders

import memformer
from memformer.bench.contestants import OWN, build, number_of_parameters, parameters
from memformer.settings import ModelSettings
from memformer.tasks import Episode

RIVALS = ("earlier", "RMT", "Transformer-XL", "Compressive")
CONTESTANTS = (*OWN, *RIVALS)
VOCABULARY, LENGTH = 11, 4
MODEL = ModelSettings(
    dim=16, heads=2, slots=4, enc_depth=1, dec_depth=1, dec_overlap=4, positions="rotary", tie_embeddings=False
)
CONFIG = MODEL.config(VOCABULARY, LENGTH)
LARGER = dataclasses.replace(MODEL, dim=64, heads=4, slots=16, dec_overlap=0).config(51, 4)


def contestant(name, config=CONFIG, states=()):
    variable = None if name in OWN else "MEMFORMER_EARLIER" if name == "earlier" else "MEMFORMER_RIVALS"
    if variable and variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    folder = Path(os.environ[variable]) if variable else None
    return build(name, Folders(rivals=folder, earlier=folder).entrants(states=states), config)


def episode(segments=5, answers=None, batch=3):
    tokens = torch.randint(1, VOCABULARY, (batch, segments, LENGTH))
    marked = torch.zeros_like(tokens, dtype=torch.bool)
    marked[:, 1:] = True
    if answers is not None:
        marked[:] = answers
    return Episode(tokens, marked)


def grid(model, given, state=None):
    """The logits at their answers' places; zero elsewhere."""
    logits = model(given, state).logits
    return torch.zeros(*given.tokens.shape, VOCABULARY).masked_scatter(given.answers[..., None], logits)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_prediction_sees_what_stands_before_it_and_nothing_else(name):
    model = contestant(name).eval()
    given = episode()
    changed = given.tokens.clone()
    changed[:, 2, 1] = (changed[:, 2, 1] + 1) % VOCABULARY
    before, after = (grid(model, given._replace(tokens=tokens)).flatten(1, 2) for tokens in (given.tokens, changed))
    place = 2 * LENGTH + 1
    torch.testing.assert_close(before[:, : place + 1], after[:, : place + 1])
    assert (before - after)[:, place + 1].abs().max() > 1e-5, "the next token's prediction sees it"
    assert (before - after)[:, 3 * LENGTH].abs().max() > 1e-6, "and so does the next segment's"
    later = (before - after)[:, 4 * LENGTH :].abs().max().item()
    assert later == 0 if name.endswith("memory off") else later > 1e-7


@pytest.mark.parametrize("name", CONTESTANTS)
def test_only_segments_with_answers_count_and_in_their_order(name):
    model = contestant(name).eval()
    given = episode()
    few = torch.zeros_like(given.answers)
    few[0, 2, 1:3] = few[1, 4, 0] = few[2, 2, 3] = True
    expected = grid(model, given)[few]
    assert expected.shape == (4, VOCABULARY)
    torch.testing.assert_close(model(given._replace(answers=few)).logits, expected)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_an_episode_in_two_parts_is_the_episode(name):
    model = contestant(name).eval()
    whole = episode()
    first, second = (Episode(*(x[:, part] for x in whole)) for part in (slice(0, 2), slice(2, None)))
    state = model(first._replace(answers=torch.zeros_like(first.answers))).state  # no answer is wanted yet
    assert not any(x.requires_grad for x in torch.utils._pytree.tree_leaves(state) if isinstance(x, torch.Tensor))
    second = second._replace(answers=torch.ones_like(second.answers))
    torch.testing.assert_close(grid(model, second, state), grid(model, whole)[:, 2:])


@pytest.mark.parametrize("name", CONTESTANTS)
def test_sizes_are_about_the_same_and_every_parameter_is_trained(name):
    own, model = contestant("memformer", LARGER), contestant(name, LARGER)
    counts = [sum(p.numel() for p in x.parameters()) for x in (own, model)]
    assert counts[1] == pytest.approx(counts[0], rel=0.07)
    numbers = model.numbers_carried(4)
    assert numbers == 0 if name.endswith("memory off") else numbers == pytest.approx(own.numbers_carried(4), rel=0.2)
    given = episode(segments=12)
    outcome = model(given)
    loss = torch.nn.functional.cross_entropy(outcome.logits, given.tokens[given.answers]) + outcome.extra_loss
    loss.backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None]
    # Memory off never writes; Compressive has a compression in the layers that keep nothing.
    allowed = {
        "memory off": "network.writer",
        "causal memory off": r"network.stack.layers.\d.(writer|norm)",
        "Compressive": "network.attn_layers.0.fn.fn.compress_mem_fn",
    }
    assert all(re.match(allowed.get(name, "nothing"), parameter) for parameter in unused), unused


@pytest.mark.parametrize("name", OWN)
def test_the_memory_is_written_as_the_settings_say(name):
    given = {"write_temperature": 0.1, "forgetting": 0.5, "mem_updates": 2}
    settings = dataclasses.replace(ModelSettings(dim=16, heads=2, dec_overlap=1), **given)
    config = build(name, OWN, settings.memformer_config(20, 6)).network.config
    assert (config.write_temperature, config.forgetting, config.num_mem_updates) == tuple(given.values())


def test_transformer_xl_gets_the_state_that_is_asked_for():
    assert contestant("Transformer-XL x 8", states=(8,)).numbers_carried(4) == 8 * 4 * 16


def test_compressive_trains_its_keys_and_values_to_the_end():
    """The package would stop at the first compression; in evaluation it does not compress for a loss."""
    model, given, grads = contestant("Compressive"), episode(segments=12), []
    for training in (True, False):
        model.train(training).zero_grad()
        logits = model(given).logits
        torch.nn.functional.cross_entropy(logits, given.tokens[given.answers]).backward()
        grads.append([layer.fn.fn.to_kv.weight.grad.clone() for layer in model.network.attn_layers])
    torch.testing.assert_close(*grads)
    assert all(grad.abs().max() > 0 for grad in grads[0])


def test_the_earlier_library_leaves_this_one_in_its_place():
    mine = sys.modules["memformer.model"]
    model = contestant("earlier")
    assert type(model.network) is not memformer.Memformer
    assert sys.modules["memformer.model"] is mine
    assert sys.modules["memformer"] is memformer
    assert "memformer.mrbp" not in sys.modules


def test_another_package_of_this_name_is_built_beside_this_one(tmp_path):
    """Without the earlier library: whatever this one counts, it counts before it is put away."""
    (tmp_path / "memformer").mkdir()
    (tmp_path / "memformer" / "__init__.py").write_text(
        "from torch import nn\n"
        "class Memformer(nn.Module):\n"
        "    def __init__(self, dim, **settings):\n"
        "        super().__init__()\n"
        "        self.map = nn.Linear(10 * dim, dim)\n"
    )
    model = build("earlier", Folders(earlier=tmp_path).entrants(["earlier"]), CONFIG)
    assert type(model.network) is not memformer.Memformer
    assert number_of_parameters(model.network) == pytest.approx(parameters(CONFIG), rel=0.1)
    assert sys.modules["memformer"] is memformer


def test_those_take_part_whose_folder_is_given_or_who_are_named(tmp_path):
    assert list(Folders().entrants()) == list(OWN)
    assert list(Folders(earlier=tmp_path).entrants()) == [*OWN, "earlier"]
    assert list(Folders().entrants(["RMT"])) == [*OWN, "RMT"]
    states = ["Transformer-XL x 1", "Transformer-XL x 0.5"]
    assert list(Folders(rivals=tmp_path).entrants(states=(1, 0.5))) == [*OWN, "RMT", *states, "Compressive"]
    assert [line.split(":")[0] for line in Folders(rivals=tmp_path).missing] == ["the earlier library"]
    entrants = Folders(rivals=tmp_path, earlier=tmp_path).entrants()
    assert list(pickle.loads(pickle.dumps(entrants))) == list(entrants), "other processes build them too"


@pytest.mark.parametrize("name", RIVALS)
def test_a_missing_package_is_refused_with_the_command_that_gets_it(name, tmp_path):
    option = "earlier" if name == "earlier" else "rivals"
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match=rf"{option}: expected a folder made by `pip install --no-deps --target"):
            build(name, Folders(rivals=folder, earlier=folder).entrants([name]), CONFIG)


def test_mistakes_are_refused():
    with pytest.raises(
        ValueError, match=r"contestants: expected some of memformer, .*, got 'GPT'\. .* python -m bench"
    ):
        build("GPT", OWN, CONFIG)
    with pytest.raises(ValueError, match="answers: expected none in the first segment"):
        contestant("memformer")(episode(answers=True))
