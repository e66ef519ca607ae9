"""The ledger against a naive count over batches."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch

from megatron_glm.data.blank_infilling import OBJECTIVE_NAMES, Objective
from megatron_glm.data.ledger import Ledger, ledger_lines
from tests.ranks import run_ranks


def random_batch(rng, size=4, rows=6, length=64):
    ends = np.sort(rng.randint(0, length, (size, rows)), axis=1)
    used = rng.randint(1, rows, size)
    objectives = rng.randint(0, 4, (size, rows))
    sources = rng.randint(0, 2, (size, rows))
    for row, count in enumerate(used):
        ends[row, count:] = length
        objectives[row, count:] = sources[row, count:] = -1
    mask = rng.randint(0, 2, (size, length)).astype(np.float32)
    return [torch.from_numpy(array) for array in (objectives, sources, ends, mask)]


def naive(batches, names):
    counts = defaultdict(lambda: [0, 0, 0])
    for objectives, sources, ends, mask in batches:
        for row in range(len(ends)):
            begin = 0
            for objective, source, end in zip(
                objectives[row].tolist(), sources[row].tolist(), ends[row].tolist(), strict=True
            ):
                if objective >= 0:
                    count = counts[names[source], OBJECTIVE_NAMES[Objective(objective)]]
                    count[0] += 1
                    count[1] += end - begin
                    count[2] += int(mask[row, begin:end].sum())
                begin = end
    return counts


def test_counts_are_those_of_a_naive_loop_across_a_restart():
    rng = np.random.RandomState(0)
    batches = [random_batch(rng) for _ in range(6)]
    first, second = Ledger(["a", "b"]), Ledger(["b", "a"])
    for batch in batches[:3]:
        first.add(*batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[3:]:
        second.add(*batch)
    expected = naive(batches[:3], ["a", "b"])
    for key, row in naive(batches[3:], ["b", "a"]).items():
        expected[key] = [a + b for a, b in zip(expected[key], row, strict=True)]
    assert second.state_dict() == {
        source: {name: row for (owner, name), row in expected.items() if owner == source}
        for source in ("a", "b")
    }


def test_a_source_that_is_no_longer_read_is_remembered():
    ledger = Ledger(["new"])
    ledger.load_state_dict({"old": {"[MASK]": [1, 300, 20]}})
    ledger.add(torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[100]]), torch.ones(1, 100))
    assert ledger_lines(ledger.state_dict()) == [
        "new [gMASK]: 1 samples, 100 tokens (25.00%), 100 targets",
        "old [MASK]: 1 samples, 300 tokens (75.00%), 20 targets",
    ]


def state_of_rank():
    rank = torch.distributed.get_rank()
    ledger = Ledger(["a", "b"])
    ledger.load_state_dict({"a": {"[MASK]": [7, 8, 9]}})
    ledger.add(*random_batch(np.random.RandomState(rank)))
    return ledger.state_dict(torch.distributed.group.WORLD)


@pytest.mark.ranks
def test_ranks_are_added_up_and_what_came_before_counts_once():
    expected = naive([random_batch(np.random.RandomState(rank)) for rank in range(2)], ["a", "b"])
    expected["a", "[MASK]"] = [
        a + b for a, b in zip(expected["a", "[MASK]"], [7, 8, 9], strict=True)
    ]
    for state in run_ranks(state_of_rank, world_size=2):
        assert {(source, name): row for source, rows in state.items()
                for name, row in rows.items()} == dict(expected)
