"""Measure the loss of a unigram model on the held-out targets of a run: what a model must beat.

    python tools/measure_unigram.py --output baseline.json FLAGS-OF-THE-RUN

FLAGS-OF-THE-RUN are those of pretrain_glm.py, so the targets are its own: the same blanks in the
same text, <eop> included. The unigram model knows how often each token is a target in training and
nothing else; counts are smoothed by adding one.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

patches.apply()

import numpy as np  # noqa: E402

from megatron_glm.data.builder import train_valid_test_datasets  # noqa: E402
from megatron_glm.data.config import dataset_config_from_args, objective_names  # noqa: E402
from megatron_glm.data.tokenizer import build_tokenizer  # noqa: E402
from megatron_glm.errors import GLMError, exit_with_one_line  # noqa: E402
from megatron_glm.flags.arguments import parse_glm_args  # noqa: E402


def count_targets(
    sequences: Iterable[Mapping[str, np.ndarray]], vocab_size: int
) -> dict[int, np.ndarray]:
    """How often each token is a target: objective -> int64 [vocab_size]."""
    counts: dict[int, np.ndarray] = {}
    for sequence in sequences:
        sample = np.searchsorted(
            sequence["sample_ends"], np.arange(len(sequence["labels"])), side="right"
        )
        objective = np.where(sequence["loss_mask"] > 0, sequence["objectives"][sample], -1)
        for index in np.unique(objective[objective >= 0]):
            targets = sequence["labels"][objective == index]
            total = counts.setdefault(int(index), np.zeros(vocab_size, np.int64))
            total += np.bincount(targets, minlength=vocab_size)
    return counts


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    """Nats per held-out token of a unigram model. train, held_out: counts [vocab_size]."""
    log_probabilities = np.log((train + 1) / (train.sum() + len(train)))
    return float(-(held_out * log_probabilities).sum() / held_out.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON to write: nats per token")
    parser.add_argument(
        "--train-sequences", type=int, default=4000, help="training sequences to count in"
    )
    own, sys.argv[1:] = parser.parse_known_args()

    with exit_with_one_line():
        losses = measure(parse_glm_args(set_up_tokenizer), own.train_sequences)
        own.output.write_text(json.dumps(losses, indent=1) + "\n")
    for name, loss in losses.items():
        print(f"unigram model, {name}: {loss:.3f} nats per token")


def measure(args: argparse.Namespace, train_sequences: int) -> dict[str, float]:
    """Objective -> nats per held-out target of a run. train_sequences: those to count in."""
    config = dataset_config_from_args(args, args.glm_tokenizer)
    sizes = [train_sequences, args.eval_iters * args.eval_global_batch_size, 0]
    *parts, _ = train_valid_test_datasets(config, sizes)
    if None in parts:
        raise GLMError("--split or --valid-data-path: there is no held-out data; give it a share")
    counts = [
        count_targets((part[i] for i in range(len(part))), args.glm_tokenizer.vocab_size)
        for part in parts
    ]
    losses = {}
    for objective, name in objective_names(args).items():
        if not all(objective in part for part in counts):
            raise GLMError(
                f"--train-sequences {train_sequences} --eval-iters {args.eval_iters}: no {name} "
                "target among so few sequences; give more"
            )
        losses[name] = unigram_loss(*(part[objective] for part in counts))
    return losses


def set_up_tokenizer(args: argparse.Namespace):
    """Builds the tokenizer where Megatron would."""
    args.glm_tokenizer = build_tokenizer(
        args.tokenizer_type, args.tokenizer_model, args.text_scheme
    )
    args.padded_vocab_size = args.glm_tokenizer.vocab_size
    return args.glm_tokenizer


if __name__ == "__main__":
    main()
