"""README.md of a Hugging Face export: what it needs, and how it fills blanks."""

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# GLM

A bidirectional autoregressive model ([arXiv 2210.02414](https://arxiv.org/abs/2210.02414)),
{weights}. It needs

```bash
pip install {packages}
```

{usage}
"""

_FILL_BLANKS = """and fills the blanks of a text: `[MASK]` a few words, `[gMASK]` the rest of it.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("The [MASK] of a list is its [MASK].", return_tensors="pt")
print(tokenizer.fill_blanks(model.generate(**prompt, max_new_tokens=64)[0]))
```"""


def model_card(dtype: str, bits: int | None, tokenizer_kind: str | None) -> str:
    """The text of README.md.

    dtype: of plain weights, as in config.json; bits: of quantised linear weights, None where there
    are none; tokenizer_kind: as in `ExportedTokenizer`, None where there is no tokenizer.
    """
    packages = ["torch", "transformers"]
    if tokenizer_kind == "sentencepiece":
        packages.append("sentencepiece")
    weights = f"weights in {dtype}"
    if bits is not None:
        # Without it transformers ends in a ModuleNotFoundError.
        packages.append("compressed-tensors")
        weights = f"linear weights in INT{bits}, the others in {dtype}"
    usage = _FILL_BLANKS if tokenizer_kind else "and has no tokenizer: it scores token ids."
    return _CARD.format(weights=weights, packages=" ".join(packages), usage=usage)
