"""Which layers share pages, and what a sequence then holds; the models' own windows."""

import jax.numpy as jnp
import pytest
import toy_model
from toy_model import Config

from jaxserve import attention
from jaxserve.dry_run import trace
from jaxserve.errors import ConfigError
from jaxserve.models import ARCHITECTURES, find_model
from jaxserve.page_groups import PageGroups, capacity, first_block, longest, pages_held
from jaxserve.spec import CacheSpec, Model

GEMMA_3 = {  # of the published models: layers, and every sixth one sees all
    "1b": (26, 512, (None, *[512] * 6), 4),
    "4b": (34, 1024, (None, *[1024] * 6), 5),
    "12b": (48, 1024, (None, *[1024] * 5), 8),
    "27b": (62, 1024, (None, *[1024] * 6), 10),
}


@pytest.mark.parametrize("name", GEMMA_3)
def test_the_groups_of_gemma_3(name):
    layers, window, groups, size = GEMMA_3[name]
    windows = tuple(None if i % 6 == 5 else window for i in range(layers))
    found = PageGroups.of(windows, 32768)
    assert (found.windows, found.layers) == (groups, size)
    assert len(set(found.places)) == layers, "no two layers in one place"
    assert all(number < size and found.windows[group] == windows[i] for i, (group, number) in enumerate(found.places))


def test_the_groups_of_others():
    def of(windows, length=8192):
        found = PageGroups.of(windows, length)
        return found.windows, found.layers

    assert of((4096, None) * 21) == ((None, 4096), 21), "Gemma 2 9B"
    assert of((4096, None) * 21, 4096) == ((None,), 42), "no sequence is longer than the window"
    assert of((None,) * 16) == ((None,), 16)
    assert of((4096,) * 32) == ((4096,), 32), "Mistral 7B: one group, whose pages are given up"
    assert of((None,) * 27 + (64,)) == ((None,), 28), "one layer alone gains less than others would lose"
    assert of(tuple(range(100, 112)), 8192) == ((111,), 12), "too many kinds: all keep what one of them needs"
    assert PageGroups.of((9,) * 3, 64).places == ((0, 0), (0, 1), (0, 2))


@pytest.mark.parametrize("windows", [(None,), (None, 1), (None, 6, 6), (9,), (4, 17), (None, 40)])
@pytest.mark.parametrize("size", [1, 4, 16])
def test_what_a_growing_sequence_holds_at_most(windows, size):
    most = 0
    for tokens in range(1, 60):
        most = max(most, sum((tokens - 1) // size - first_block(tokens - 1, w, size) + 1 for w in windows))
        held = pages_held(windows, tokens, size)
        assert held >= most
        assert held - most <= sum(w is not None for w in windows), "a page a window, while it is not yet full"
        assert longest(windows, held, size, 59) >= tokens
        assert longest(windows, held - 1, size, 59) < tokens


def test_capacity_in_words():
    assert capacity((None,), 64, 16, 512) == "64 pages of 16 tokens: 1024 tokens"
    assert capacity((None, 32, 32), 96, 16, 512) == (
        "96 pages of 16 tokens for 3 groups of layers, of which 2 keep a window: 1293 tokens in sequences of 512, "
        "512 in short ones"
    )
    assert capacity((32,), 96, 16, 512).startswith("96 pages of 16 tokens that keep a window: 16384 tokens in")


@pytest.mark.parametrize(
    ("name", "hf", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 7}, (7,) * 4),
        ("MistralForCausalLM", {"sliding_window": None}, (None,) * 4),
        ("MixtralForCausalLM", {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1}, (7,) * 4),
        ("Phi3ForCausalLM", {"sliding_window": 7}, (7,) * 4),
        ("Gemma2ForCausalLM", {"sliding_window": 7}, (7, None) * 2),
        ("Gemma3ForCausalLM", {"sliding_window": 7, "sliding_window_pattern": 3}, (7, 7, None, 7)),
        (
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3},
            (*[None] * 3, 7),
        ),
        ("LlamaForCausalLM", {}, ()),
    ],
)
def test_models_say_their_windows(name, hf, windows):
    assert name in ARCHITECTURES
    sizes = {
        "num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16,
        "intermediate_size": 8, "max_position_embeddings": 64, "head_dim": 4, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    model, config = find_model({"architectures": [name], **sizes, **hf}, None)
    assert model.cache_spec(config).windows == windows
    assert CacheSpec(4, 1, 4).groups(64) == PageGroups.single(4)


@pytest.mark.parametrize("windows", [(4,), (4, 0), (None, 2.5)])
def test_windows_that_are_none_are_refused(windows):
    class Windowed(Config):
        pass

    config = Windowed(2, 1, 1, 1, 2, 50, 64)
    object.__setattr__(config, "windows", windows)
    with pytest.raises(ConfigError, match=r"Windowed.windows is .*; needed are 2 whole numbers above 0"):
        Model.of(toy_model).cache_spec(config)


def test_a_model_that_sees_more_than_it_says_is_refused():
    class Windowed(Config):
        windows = (3,)

    with pytest.raises(ConfigError, match=r"attend of layer 0 has window=None; the config's windows say 3"):
        trace(Model.of(toy_model), Windowed(1, 1, 1, 1, 2, 50, 64), "float32")
    q = jnp.zeros((1, 1, 2))
    groups, seen = PageGroups.of((3, None), 64), []
    attend = attention.bind(lambda *a, window, **_: (seen.append(window), a[:4:3])[1], groups, [q] * 2, [q] * 2, q, q)
    for layer, window, text in (
        (0, None, "attend of layer 0 is called with window=None, and by the Config's windows only 3 tokens are kept"),
        (0, 4, "window=4"),
        (jnp.int32(0), 3, "a traced layer"),
    ):
        with pytest.raises(ConfigError, match=text):
            attend(layer, q, q, q, q, window=window)
    for layer, window in ((0, 3), (0, 2), (1, None), (1, 9)):
        attend(layer, q, q, q, q, window=window)
    assert seen == [3, 2, None, 9]
