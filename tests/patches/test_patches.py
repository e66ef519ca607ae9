"""Each patch: the fault is there without it and gone with it, and other code is refused."""

import json
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import patches
from patches.patch import CONDITIONS, Patch, PatchDriftError, Target, constant

ROOT = Path(__file__).parents[2]
PATCHES = patches.load()
NO_FUSED_ADAM = "no Transformer Engine or Apex"
TARGETS = [target for patch in PATCHES.values() for target in patch.targets]

# Run without the patches, in a process that has imported Megatron and nothing of theirs.
UNPATCHED = """
import json, sys, warnings
warnings.simplefilter("ignore")
import patches
import megatron.training.training

def bound(target):
    if not target.path.startswith("megatron") or "." in target.path.partition(":")[2]:
        return []
    original = target.current()
    return [
        f"{name}:{attribute}"
        for name, module in list(sys.modules.items()) if name.startswith("megatron")
        for attribute, value in vars(module).items() if value is original
    ]

def reproduces(patch):
    try:
        return patch.reproduces()
    except BaseException as error:
        return repr(error)

found = {t.path: bound(t) for p in patches.load().values() for t in p.targets}
faults = {name: reproduces(patch) for name, patch in patches.load().items()}
print(json.dumps([found, faults]), file=open(sys.argv[1], "w"))
"""


def python(*arguments, **options):
    """A fresh interpreter in the root of the repository."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory):
    """Where each target is bound, and whether each fault shows, without the patches."""
    report = tmp_path_factory.mktemp("unpatched") / "report.json"
    process = python("-c", UNPATCHED, str(report))
    assert process.returncode == 0, process.stderr
    return json.loads(report.read_text())


@pytest.mark.parametrize("name", PATCHES)
def test_the_fault_is_still_there(name, unpatched):
    # What a machine with a GPU needs shows without one too.
    if not PATCHES[name].needed() and PATCHES[name].when != "GPU":
        pytest.skip(f"{name} is for machines with {PATCHES[name].when}")
    if PATCHES["cpu_transformer_engine"].needed() and PATCHES[name].when == NO_FUSED_ADAM:
        pytest.skip(f"{name} is needed because cpu_transformer_engine is applied")
    assert unpatched[1][name] is True, (
        f"{unpatched[1][name]}: delete patches/{name}.py if upstream has cured the fault"
    )


@pytest.mark.parametrize("name", patches.apply())
def test_the_patch_cures_the_fault(name):
    assert PATCHES[name].reproduces() is False


def test_every_place_where_a_target_is_bound_is_named(unpatched):
    of_megatron = [t for t in TARGETS if t.path.startswith("megatron")]
    named = {t.path: {t.path, *t.also} for t in of_megatron if not changes_in_place(t)}
    assert {p: set(places) for p, places in unpatched[0].items() if p in named and places} == {
        path: places for path, places in named.items() if unpatched[0][path]
    }


def changes_in_place(target):
    """Whether the replacement is the original, so that it need not be bound anew."""
    probe = types.FunctionType(faulty.__code__, {})
    return target.replace(probe) is probe


def test_applying_says_nothing():
    """Megatron and torch warn at their import; what a program prints is its own."""
    process = subprocess.run(
        [sys.executable, "-c", "import patches; patches.apply()"],
        cwd=ROOT, env=os.environ | {"CUDA_HOME": "/usr"}, capture_output=True, text=True,
        timeout=200,
    )  # fmt: skip
    assert (process.stdout, process.stderr) == ("", "")


def test_apply_is_idempotent_and_names_what_the_machine_needs():
    first = patches.apply()
    assert patches.apply() == first
    assert first == [name for name, patch in PATCHES.items() if patch.needed()]


def test_the_name_says_whether_a_patch_is_for_machines_without_a_gpu():
    for name, patch in PATCHES.items():
        assert name.startswith("cpu_") == patch.when.startswith("no GPU"), name


def test_a_machine_with_a_gpu_gets_no_cpu_patch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert all(patch.needed() is False for n, patch in PATCHES.items() if n.startswith("cpu_"))


def test_with_fused_adam_the_steps_of_the_distributed_optimizer_are_left_alone(monkeypatch):
    monkeypatch.setitem(CONDITIONS, NO_FUSED_ADAM, lambda: False)
    still_needed = {name for name, patch in PATCHES.items() if patch.needed()}
    distributed = {name for name in PATCHES if name.startswith("fix_distopt_")}
    assert distributed & still_needed == {"fix_distopt_load_grad"}


@pytest.fixture
def broken_transformer_engine(monkeypatch, tmp_path):
    """One that is found first and raises at its import."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("assert False, 'no transformer-engine-torch'")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == package.name]:
        monkeypatch.delitem(sys.modules, name)


def test_a_broken_transformer_engine_gets_a_clear_message(broken_transformer_engine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="import fails.*no transformer-engine-torch.*uninstall"):
        CONDITIONS[NO_FUSED_ADAM]()


def test_without_a_gpu_transformer_engine_is_not_even_imported(broken_transformer_engine):
    program = (
        "import patches; print(*patches.apply()); from megatron.core import optimizer; "
        "import torch; assert optimizer.Adam is torch.optim.AdamW"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": sys.path[0]}
    process = python("-c", program, env=environment)
    assert process.returncode == 0, process.stderr
    assert "cpu_transformer_engine" in process.stdout.split()
    assert "fix_distopt_shared_step" in process.stdout.split()


def test_apply_after_megatron_is_refused():
    program = (
        "import sys, types; sys.modules['megatron.core'] = types.ModuleType('megatron.core'); "
        "import patches; patches.apply()"
    )
    process = python("-c", program)
    assert "call it before the first megatron import" in process.stderr


def faulty(value=1):
    """What the patches of these tests replace."""
    return value


namesake = faulty
HERE = __name__


def a_patch(**changes) -> Patch:
    path = f"{HERE}:faulty"
    patch = Patch(
        reason="none",
        upstream="not reported",
        versions={"torch": "==2.*"},
        when="always",
        targets=(Target(path, Target(path, "", constant(None)).current_source(), constant(None)),),
        reproduces=lambda: False,
    )
    return replace(patch, **changes)


def with_target(**changes) -> Patch:
    return a_patch(targets=(replace(a_patch().targets[0], **changes),))


def test_known_versions_and_sources_pass():
    a_patch().check_versions("x")
    a_patch().check_sources("x")


def test_another_version_is_refused_by_name_with_the_cure():
    with pytest.raises(PatchDriftError, match=r"patches/x.py knows torch ==1.*Install torch==1"):
        a_patch(versions={"torch": "==1.*"}).check_versions("x")


def test_another_source_is_refused_by_name_with_the_cure():
    with pytest.raises(PatchDriftError, match=r"patches/x.py .*faulty.*source 12ab(.|\n)*compare"):
        with_target(source="12ab").check_sources("x")


def test_a_target_that_is_gone_is_refused_by_name():
    with pytest.raises(PatchDriftError, match=r"patches/x.py replaces .*:gone, which is gone"):
        with_target(path=f"{HERE}:gone").check_sources("x")
    with pytest.raises(PatchDriftError, match=r"patches/x.py replaces gone:faulty, which is gone"):
        with_target(path="gone:faulty").check_sources("x")


def test_a_second_place_that_holds_something_else_is_refused():
    with pytest.raises(PatchDriftError, match=r"patches/x.py expects .*:python to be .*:faulty"):
        with_target(also=(f"{HERE}:python",)).check_sources("x")


def test_the_source_of_a_wrapped_target_is_that_of_the_original(monkeypatch):
    import functools

    patch = a_patch()
    monkeypatch.setattr(sys.modules[HERE], "faulty", functools.wraps(faulty)(lambda: None))
    patch.check_sources("x")


def test_drift_in_one_patch_stops_all_of_its_kind(monkeypatch):
    both = {"fix_good": a_patch(), "fix_drifted": with_target(source="12ab")}
    monkeypatch.setattr(patches, "load", lambda: both)
    monkeypatch.setattr(patches, "_applied", [])
    monkeypatch.delitem(sys.modules, "megatron.core")
    with pytest.raises(PatchDriftError, match="patches/fix_drifted.py"):
        patches.apply()
    assert faulty() == 1
    assert patches._applied == []


def test_apply_replaces_the_target_everywhere(monkeypatch):
    elsewhere = f"{HERE}:namesake"
    monkeypatch.setattr(patches, "load", lambda: {"fix_x": with_target(also=(elsewhere,))})
    monkeypatch.setattr(patches, "_applied", [])
    monkeypatch.setattr(sys.modules[HERE], "faulty", faulty)
    monkeypatch.setattr(sys.modules[HERE], "namesake", faulty)
    monkeypatch.delitem(sys.modules, "megatron.core")
    assert patches.apply() == ["fix_x"]
    assert faulty is None and namesake is None


def test_the_list_names_target_state_and_reason_of_every_patch():
    process = python("-m", "patches")
    assert process.returncode == 0, process.stderr
    text = " ".join(process.stdout.split())
    assert "DRIFTED" not in text
    for name, patch in PATCHES.items():
        assert f"{name}: " in text
        assert patch.reason in text
        assert patch.upstream in text
        assert all(target.path in text for target in patch.targets)
