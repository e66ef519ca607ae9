"""Shows what a model is trained on: one sequence taken apart, or statistics of many.

    python tools/explain_sample.py --index 7 <the flags of pretrain_glm.py>
    python tools/explain_sample.py --index 7 --run CHECKPOINT_DIRECTORY
    python tools/explain_sample.py --stats 1000 --json --run CHECKPOINT_DIRECTORY

Of the flags only those of the data matter: --data-path and its kin, --seq-length, --split, --seed,
--tokenizer-type, --tokenizer-model and GLM's flags of data and objective. --run takes all of them
from a run's last checkpoint.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import patches  # noqa: E402

patches.apply()

import numpy as np  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402

from megatron_glm.checkpoint.megatron import MegatronCheckpoint  # noqa: E402
from megatron_glm.data.builder import MixedDataset, train_valid_test_datasets  # noqa: E402
from megatron_glm.data.config import DataError, dataset_config_from_args  # noqa: E402
from megatron_glm.data.sample_view import render, sample_rows, view_sequence  # noqa: E402
from megatron_glm.data.statistics import measure  # noqa: E402
from megatron_glm.data.tokenizer import build_tokenizer  # noqa: E402
from megatron_glm.errors import exit_with_one_line  # noqa: E402
from megatron_glm.flags.arguments import add_glm_arguments, fill_derived  # noqa: E402
from megatron_glm.flags.rules import TOKENIZER, check_required  # noqa: E402
from megatron_glm.pictures import check_picture  # noqa: E402


def args_of_run(directory: Path) -> argparse.Namespace:
    """The flags that the last checkpoint in a directory was saved with."""
    args = MegatronCheckpoint(directory).args
    if not hasattr(args, "data_path"):
        raise DataError(
            f"--run {directory}: was converted, so it knows no data; give the flags of the data"
        )
    return args


def build_dataset(args: argparse.Namespace, split: Split) -> tuple[MixedDataset, object]:
    """The dataset of a split as training would build it, and the tokenizer."""
    check_required(args, (*TOKENIZER, "seq_length"))
    fill_derived(args)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model, args.text_scheme)
    config = dataset_config_from_args(args, tokenizer)
    num_samples = [1 if other == split else 0 for other in Split]
    dataset = train_valid_test_datasets(config, num_samples)[split.value]
    if dataset is None:
        raise DataError(f"--of {split.name}: the flags give that split no data")
    return dataset, tokenizer


def visibility(packed: dict[str, np.ndarray]) -> np.ndarray:
    """What each token (row) sees: [s, s] int8; 0 nothing, 1 in a context, 2 as a filled part."""
    size = len(packed["tokens"])
    image = np.zeros((size, size), dtype=np.int8)
    for begin, end, context_length, _ in sample_rows(packed):
        split = begin + context_length
        image[begin:end, begin:split] = 1
        image[split:end, split:end] = 2 * np.tri(end - split, dtype=np.int8)
    return image


def draw(packed: dict[str, np.ndarray], output: Path) -> None:
    """Writes a picture of what each token sees. output: its suffix chooses the format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = ["white", "tab:blue", "tab:orange"]
    figure, axes = plt.subplots(figsize=(9, 8), layout="constrained")
    axes.imshow(visibility(packed), cmap=ListedColormap(colors), vmin=0, vmax=2,
                interpolation="nearest")
    for begin, end, _, _ in sample_rows(packed):
        axes.add_patch(plt.Rectangle((begin - 0.5, begin - 0.5), end - begin, end - begin,
                                     fill=False, linewidth=0.8))
    axes.set_xlabel("token that is seen")
    axes.set_ylabel("token that sees")
    axes.legend(
        handles=[Patch(color=colors[1], label="context"),
                 Patch(color=colors[2], label="what was generated before")],
        loc="upper right",
    )
    figure.savefig(output, dpi=150)
    plt.close(figure)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--index", type=int, default=0, help="sequence of the run; default 0")
    parser.add_argument("--of", choices=[split.name for split in Split], default="train",
                        help="the split it is from; default train")
    parser.add_argument("--run", type=Path, help="the run's checkpoint directory")
    parser.add_argument("--stats", type=int, metavar="N",
                        help="print statistics of N sequences from --index on instead")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--png", type=Path, help="draw what each token sees into this file")
    own, rest = parser.parse_known_args(argv)
    if own.run and rest:
        parser.error(f"--run takes the flags of the run: drop {' '.join(rest)}")
    if own.index < 0 or (own.stats is not None and own.stats < 1):
        parser.error("--index must be 0 or more, and --stats 1 or more")
    return own, rest


def explain(own: argparse.Namespace, args: argparse.Namespace) -> str:
    """What is printed; draws the picture that is asked for."""
    dataset, tokenizer = build_dataset(args, Split[own.of])
    if own.stats is not None:
        found = measure(dataset, range(own.index, own.index + own.stats))
        return json.dumps(found, indent=None if own.json else 2, ensure_ascii=False)
    if own.png:
        draw(dataset[own.index], own.png)
    view = view_sequence(dataset, own.index, tokenizer)
    return json.dumps(view.as_dict(), ensure_ascii=False) if own.json else render(view)


def main() -> None:
    own, rest = parse(sys.argv[1:])
    for name in ("megatron.core", "megatron_glm.data"):
        # The latter counts epochs, as if what is shown were all of a run.
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    sys.argv[1:] = rest
    with exit_with_one_line():
        check_picture("--png", own.png)
        # Megatron announces what it understood; what this prints may be read by a program.
        with contextlib.redirect_stdout(sys.stderr):
            args = args_of_run(own.run) if own.run else parse_args(add_glm_arguments)
            text = explain(own, args)
        print(text)


if __name__ == "__main__":
    main()
