"""Settings of a checkpoint under the names that training compares."""

import pytest

from megatron_glm.checkpoint.errors import CheckpointError
from megatron_glm.checkpoint.settings import Settings
from megatron_glm.training.settings import SETTINGS
from tests.checkpoint.building import SMALL

KNOWN = Settings(SMALL, "fp16", False, 512, {"type": "IceTokenizer", "sha256": "0"})


def test_the_names_are_those_that_training_compares():
    assert set(KNOWN.as_flags()) == {setting.dest for setting in SETTINGS}


def test_flags_lead_back_to_the_settings():
    assert Settings.from_flags(KNOWN.as_flags(), 512, "here") == KNOWN


@pytest.mark.parametrize("name", sorted(KNOWN.as_flags()))
def test_a_missing_setting_is_named(name):
    flags = KNOWN.as_flags()
    del flags[name]
    with pytest.raises(CheckpointError, match=f"here: the setting '{name}'"):
        Settings.from_flags(flags, 512, "here")


@pytest.mark.parametrize(
    "change",
    [{"layernorm_epsilon": 1e-6}, {"rotary_base": 500}, {"kv_channels": 4},
     {"rotary_angle_dtype": "fp8"}, {"num_layers": "two"}, {"num_layers": None}],
)  # fmt: skip
def test_settings_that_are_not_of_this_architecture_are_refused(change):
    with pytest.raises(CheckpointError):
        Settings.from_flags(KNOWN.as_flags() | change, 512, "here")


def test_overrides_leave_out_what_is_not_given():
    changed = KNOWN.with_overrides(rotary_angle_dtype="fp32", tokenizer_fingerprint=None)
    assert changed.rotary_angle_dtype == "fp32"
    assert changed.tokenizer_fingerprint == KNOWN.tokenizer_fingerprint
    assert KNOWN.with_overrides(unified_multitask_encoding=True).unified_multitask_encoding
