"""Tokenizers of bytes whose chat templates differ in the tokens that they write."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN, END, TURN = "<s>", "</s>", "<turn>"

TURNS = "{% for one in messages %}{{ one.role[0] + ':' }}{{ one.content + '</s>' }}{% endfor %}"
BEGUN = "{{ bos_token }}" + TURNS
MARKED = (
    "{{ bos_token }}{% for one in messages %}{{ one.role[0] + ':' }}{% if one.role == 'assistant' %}"
    "{% generation %}{{ one.content + '</s>' }}{% endgeneration %}{% else %}{{ one.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ one.content + '</s>' }}{% endgeneration %}", "{{ one.content }}{% endgeneration %}</s>"
)
ENDLESS = "{{ bos_token }}{% for one in messages %}{{ one.role[0] + ':' + one.content }}{% endfor %}"


def tokenizer(template: str | None = MARKED, begins: bool = True, pad: str = END) -> Any:
    """Return a tokenizer of bytes. begins: whether it puts its begin token before texts. pad: the token for padding."""
    letters = [BEGIN, END, TURN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    if begins:
        made.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    out = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BEGIN, eos_token=END, pad_token=pad, additional_special_tokens=[TURN]
    )
    out.chat_template = template
    return out
