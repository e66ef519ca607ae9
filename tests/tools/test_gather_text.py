"""tools/gather_text.py takes documentation, once, in one order, and splits it by document."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tools import gather_text

TOOL = Path(gather_text.__file__)
STORY = (
    "The garbage collector walks over every object that was allocated since the last collection "
    "and releases those that nothing refers to any more, so that their memory can be used again, "
    "which it does the more seldom the longer an object has lived."
)
OTHER = (
    "A queue hands its items out in the order in which they were put in, and blocks the caller "
    "until there is one, unless a timeout was given, in which case it raises an exception."
)


@pytest.fixture
def site(tmp_path):
    """A folder of packages with one document of each kind, and things that are no document."""
    root = tmp_path / "site"
    files = {
        "a/module.py": f'"""{STORY}"""\n\nclass A:\n    def f(self):\n        """{OTHER}\n\n'
        '        More of it.\n        """\n\nX = """Not documentation."""\n',
        "a/guide.md": f"# Guide\n\n{STORY} Guide.\n\n{OTHER}\n",
        "b-1.0.dist-info/METADATA": f"Name: b\nVersion: 1.0\n\n# b\n\n{STORY} And b.",
        "b-1.0.dist-info/licenses/LICENSE.txt": f"{STORY} Licence.",
        "c/LICENSE.md": f"{STORY} Another licence.",
        "c/table.txt": "0.1 0.2 0.3\n" * 100,
        "c/latin.txt": "é",
        "c/tests/notes.txt": f"{STORY} Test.",
        "site-packages/d.rst": f"{STORY} Nested root.",
    }
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("latin-1"))
    return root


def texts(roots, max_bytes=10**6):
    return {name: text for name, text, _ in gather_text.gather(roots, max_bytes)}


def test_documents_of_each_kind_are_taken_and_nothing_else(site):
    found = texts([site])
    assert list(found) == ["a/guide.md", "a/module.py", "b-1.0.dist-info/METADATA"]
    assert found["b-1.0.dist-info/METADATA"] == f"# b\n\n{STORY} And b."


def test_documentation_strings_come_in_order_without_their_indentation(site):
    strings = list(gather_text.documentation_strings((site / "a/module.py").read_text()))
    assert strings == [STORY, f"{OTHER}\n\nMore of it."]


def test_source_that_does_not_parse_has_no_documentation():
    assert list(gather_text.documentation_strings("def f(:")) == []
    assert list(gather_text.documentation_strings("\0")) == []


def test_a_long_paragraph_is_taken_once_and_a_short_one_each_time():
    seen = set()
    assert gather_text.drop_repeated(f"Returns:\n\n{STORY}", seen) == f"Returns:\n\n{STORY}"
    rewrapped = STORY.replace(" ", "\n", 3)
    assert gather_text.drop_repeated(f"Returns:\n\n{rewrapped}\n\nEnd", seen) == "Returns:\n\nEnd"


def test_two_runs_write_the_same_bytes(site, tmp_path):
    outputs = []
    for run in "12":
        output = tmp_path / run
        command = [sys.executable, TOOL, "--root", site, "--output-dir", output]
        subprocess.run([*command, "--valid-ratio", "0.5"], check=True, timeout=60)
        outputs.append([(output / f"{part}.jsonl").read_bytes() for part in ("train", "valid")])
    assert outputs[0] == outputs[1]
    records = [json.loads(line) for part in outputs[0] for line in part.splitlines()]
    assert {record["source"]: record["text"] for record in records} == texts([site])


def test_an_interrupt_ends_it_and_its_workers_at_once(tmp_path):
    command = [sys.executable, TOOL, "--root", sysconfig.get_path("stdlib"), "--output-dir"]
    process = subprocess.Popen(
        [*command, tmp_path], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    part = tmp_path / "train.jsonl.part"
    while not part.exists() or not part.stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, errors) == (130, "\ngather_text.py: interrupted\n")


def test_the_held_out_share_is_as_asked_and_each_document_keeps_its_side():
    names = [f"package/module_{i}.py" for i in range(20000)]
    held_out = {name for name in names if gather_text.is_held_out(name, 0.02)}
    assert 0.017 < len(held_out) / len(names) < 0.023
    assert held_out <= {name for name in names if gather_text.is_held_out(name, 0.05)}


def test_gathering_stops_at_the_size_asked_for(site):
    assert list(texts([site], max_bytes=10)) == ["a/guide.md"]


def test_too_little_text_is_an_error_that_leaves_no_file(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, TOOL, "--root", tmp_path / "empty", "--output-dir", tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "--root" in result.stderr
    assert not list(tmp_path.glob("*.jsonl"))
