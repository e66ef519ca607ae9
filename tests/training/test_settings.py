"""The comparison of a checkpoint's settings with a run's."""

import pytest

from megatron_glm.training.settings import SETTINGS, CheckpointMismatchError, compare_settings

SAME = {setting.dest: 1 for setting in SETTINGS}


def test_equal_settings_pass():
    compare_settings(dict(SAME), dict(SAME), "run")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.dest)
def test_each_difference_is_named_with_both_values(setting):
    with pytest.raises(CheckpointMismatchError, match=f"run .*{setting.flag} 2 there, 1 here"):
        compare_settings(SAME | {setting.dest: 2}, SAME, "run")


def test_a_setting_that_was_not_stored_is_a_difference():
    saved = {name: value for name, value in SAME.items() if name != "rotary_angle_dtype"}
    with pytest.raises(CheckpointMismatchError, match="rotary-angle-dtype .not stored. there"):
        compare_settings(saved, SAME, "run")


def test_all_differences_stand_in_one_line():
    with pytest.raises(CheckpointMismatchError) as error:
        compare_settings({name: 0 for name in SAME}, SAME, "run")
    assert str(error.value).count(" there, ") == len(SETTINGS)
    assert "\n" not in str(error.value)


def test_an_unknown_tokenizer_is_warned_of(caplog):
    compare_settings(SAME | {"tokenizer_fingerprint": None}, SAME, "run")
    assert "does not say with which tokenizer" in caplog.text
