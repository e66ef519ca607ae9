"""A program for the tests of turns that behaves as its task says."""

import time
from pathlib import Path

import torch


def run(task, turns):
    turns.built(torch.nn.Linear(3, 2))
    journal = Path(task.options["journal"])
    while True:
        turns.before_step()
        with journal.open("a") as lines:
            lines.write(f"{task.options['name']}:{turns.variant}\n")
        behaviour = task.options.get(turns.variant)
        if behaviour == "no room":
            marker = journal.with_suffix(".marker")
            if not marker.exists():
                marker.touch()
                raise torch.OutOfMemoryError("tried to allocate 2 GiB\nmore lines")
        elif behaviour == "exit":
            raise SystemExit(3)
        elif behaviour == "die":
            import os

            os._exit(7)
        elif behaviour == "hang":
            time.sleep(60)
        turns.saw(torch.tensor([[[2, 0], [4, 6]]], dtype=torch.int32), 3)
        time.sleep(0.01)
