"""Reads the text of samples back out of a batch, from nothing but what the batch says."""

import numpy as np

from megatron_glm.data.blank_infilling import Objective
from tests.data.corpora import TOKENIZER


def samples_of(packed):
    """Objective, and slices of tokens, labels, loss mask and positions, of each sample."""
    begin = 0
    rows = zip(packed["sample_ends"], packed["context_lengths"], packed["objectives"], strict=True)
    for end, context_length, objective in rows:
        if objective >= 0:
            part = slice(begin, end)
            yield Objective(objective), context_length, *(
                packed[name][part] for name in ("tokens", "labels", "loss_mask", "position_ids")
            )
        begin = end


def text_of(objective, context_length, tokens, labels, loss_mask, positions):
    """The text that a sample was made of, and how many of its tokens are targets."""
    context, fillings = tokens[:context_length], labels[context_length:]
    assert not loss_mask[:context_length].any() and loss_mask[context_length:].all()
    np.testing.assert_array_equal(positions[:context_length], np.arange(context_length))
    if objective == Objective.GMASK and len(fillings):
        assert context[-1] == TOKENIZER.gmask and tokens[context_length] == TOKENIZER.sop
        np.testing.assert_array_equal(positions, np.arange(len(positions)))
        np.testing.assert_array_equal(tokens[context_length + 1 :], fillings[:-1])
        return np.concatenate((context[:-1], fillings)), len(fillings)
    blank = TOKENIZER.smask if objective == Objective.SMASK else TOKENIZER.mask
    pieces = np.split(fillings, np.flatnonzero(fillings == TOKENIZER.eop) + 1)[:-1]
    generated, place = tokens[context_length:], 0
    by_position = {}
    for piece in pieces:
        part = slice(place, place + len(piece))
        here = positions[context_length:][part]
        assert (here == here[0]).all()
        assert generated[part][0] == TOKENIZER.sop
        np.testing.assert_array_equal(generated[part][1:], piece[:-1])
        by_position[here[0]] = piece[:-1]
        place += len(piece)
    assert place == len(fillings) and len(by_position) == (context == blank).sum()
    parts = [by_position.get(place, [token]) for place, token in enumerate(context)]
    return np.concatenate(parts).astype(np.int64), len(fillings) - len(pieces)
