"""Cutting text into sentences, Chinese and English, without losing a character."""

import re

# A Western full stop ends a sentence only before white space, since it is also a decimal point.
# What closes a quotation or a bracket belongs to the sentence that it ends; a Chinese sentence ends
# without a space. A line break ends one as well.
_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s)|[。！？；]+["'”’」』》）]*|(?=\n)""")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, of which the concatenation is the text again. White space between
    two belongs to the later one, as in the tokens of words."""
    bounds = [0]
    for match in _END.finditer(text):
        if text[bounds[-1] : match.end()].strip():
            bounds.append(match.end())
    if len(bounds) > 1 and not text[bounds[-1] :].strip():
        bounds.pop()
    return [text[a:b] for a, b in zip(bounds, [*bounds[1:], len(text)], strict=True)]
