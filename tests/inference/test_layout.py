"""Stages share the layers, and what the driver reads is what every rank reads."""

import pytest

from megatron_glm.errors import GLMError
from megatron_glm.inference.layout import Layout, process_group
from tests.inference.building import CPU
from tests.ranks import run_ranks


@pytest.mark.parametrize("num_layers, pp_size", [(4, 1), (4, 4), (7, 3), (70, 8)])
def test_stages_share_the_layers(num_layers, pp_size):
    stages = [Layout(1, pp_size, 0, stage).layers(num_layers) for stage in range(pp_size)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    assert max(map(len, stages)) - min(map(len, stages)) <= 1


def test_more_stages_than_layers_are_refused():
    with pytest.raises(GLMError, match="--pipeline-model-parallel-size 3: .* only 2 layers"):
        Layout(1, 3, 0, 2).layers(2)


def test_a_layout_of_more_processes_than_there_are_is_refused():
    with pytest.raises(GLMError, match="needs 6 processes, this run has 1"):
        Layout.create(2, 3)


def test_one_process_reads_for_itself():
    assert list(Layout().shared(iter("abc"))) == ["a", "b", "c"]


def read_on_a_rank():
    def values():
        yield from ("a", 1)
        raise GLMError("the driver has read enough")

    with process_group(CPU):
        layout = Layout.create(1, 2)
        found = []
        try:
            # The other rank's values are not touched.
            for value in layout.shared(values() if layout.is_driver else None):
                found.append(value)
        except GLMError as error:
            found.append(str(error))
        return found


@pytest.mark.ranks
def test_every_rank_gets_the_driver_s_values_and_its_error():
    assert run_ranks(read_on_a_rank, world_size=2, initialize=False) == [
        ["a", 1, "the driver has read enough"]
    ] * 2
