"""The cache holds what a list of rows would."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_glm.inference.kv_cache import KVCache

LAYERS, HEADS, DIM = 2, 2, 4


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(1, 300), min_size=1, max_size=3)),
        st.tuples(st.just("append"), st.none()),
        st.tuples(st.just("select"), st.lists(st.integers(0, 99), max_size=5)),
    ),
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(actions)
def test_cache_is_a_list_of_rows(actions):
    cache = KVCache(LAYERS, HEADS, DIM, torch.float32, torch.device("cpu"))
    expected: list[list[torch.Tensor]] = []
    generator = torch.Generator().manual_seed(0)

    def token():
        return torch.randn(LAYERS, 2, HEADS, DIM, generator=generator)

    for action, argument in actions:
        if action == "add":
            first = cache.num_rows
            cache.add_rows(argument)
            for row, length in enumerate(argument, first):
                tokens = [token() for _ in range(length)]
                expected.append(tokens)
                stacked = torch.stack(tokens, dim=3)[:, :, None]
                for layer in range(LAYERS):
                    cache.write_rows(layer, row, *stacked[layer])
        elif action == "append" and expected:
            new = [token() for _ in expected]
            at = torch.tensor(cache.add_tokens())
            for layer in range(LAYERS):
                stacked = torch.stack([t[layer] for t in new])
                cache.append(layer, at, stacked[:, 0], stacked[:, 1])
            expected = [[*row, t] for row, t in zip(expected, new, strict=True)]
        elif action == "select" and expected:
            rows = [row % len(expected) for row in argument]
            cache.select(rows)
            expected = [list(expected[row]) for row in rows]
        assert cache.lengths == [len(row) for row in expected]
    for row, tokens in enumerate(expected):
        found = cache._store[:, :, row, :, : len(tokens)]
        assert torch.equal(found, torch.stack(tokens, dim=3))
