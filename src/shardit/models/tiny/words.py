"""The text that the tiny tokenizers know: special tokens, words and chat templates.

The word list covers the system prompts of the Qwen, Z-Image, LongCat and Ovis pipelines, so that a system prompt
has about as many tokens as with the real tokenizers: those pipelines cut a fixed number of tokens off the front.
"""

from __future__ import annotations

VOCAB = 2048
"""Rows in every embedding table; the tokenizers use fewer ids than that."""

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)
CLIP_SPECIALS = ("<|startoftext|>", "<|endoftext|>")
T5_SPECIALS = ("<pad>", "</s>", "<unk>")

SYSTEM_WORDS = """
a accurately according all alter altered analyze an and appropriate are aspects as assistant attributes background based
by captioning changed clearly color consistency consistent content describe descriptive detailing determine editing
ensuring expert explain features first for from generate given helpful how image images input instruction instructions
into it key maintaining meets model modify new object objects of on only or original other others parts photo picture
precisely prompt quantity relationships remain requirements s shape should size spatial specified suitable system
task text texture that the then to user using where while with you
"""

PROMPT_WORDS = """
air at autumn back beach bear big bird black blue boat bridge bright bright brown car castle cat city cloud clouds
cold dark day deep dog door dress evening eye face field fire fish flower flowers fog forest fox front garden glass
gold golden grass green grey hand hat high hill horse hot house ice in inside is lake lamp large left light little
long low man moon morning mountain mountains near night no not old orange over owl paper people person pink purple
rain red right river road rock room running sea ship sign sitting sky small snow soft standing star stars stone
street summer sun sunset table tall tree trees two under walking wall warm water white wind window winter woman
wood yellow young
"""

SHAPES_WORDS = """
a and background black blue circle down green ground in left move moves moving of on purple red right shape square the
to towards triangle up upwards downwards video white with yellow
"""
"""Words of the captions that tiny/shapes is trained on, and some that people use for the same."""

PUNCTUATION = (*",.:;!?'\"()-_/\n", "'s", " (", "),", ").", "):", ":\n", ".\n", "\n\n")

# Written for this project; they produce what the real templates produce for plain conversations.
_TURNS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif item['type'] == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- item['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
"""
_HELPFUL = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}\n"
)
_REPLY = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
_NO_THOUGHT = (
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}{%- endif -%}"
)
CHAT_TEMPLATES = {"qwen2_vl": _HELPFUL + _TURNS + _REPLY, "qwen3": _TURNS + _NO_THOUGHT}


def words() -> list[str]:
    """Every known word once, in alphabetical order."""
    return sorted({*SYSTEM_WORDS.split(), *PROMPT_WORDS.split()})


def shapes_words() -> list[str]:
    """The words that tiny/shapes knows, in alphabetical order."""
    return sorted(SHAPES_WORDS.split())


def corpus() -> list[str]:
    """Every word as pre-tokenizers cut it, with and without the space before it and a capital, then punctuation."""
    forms = [form for word in words() for form in (word, word.capitalize())]
    return [*forms, *(f" {form}" for form in forms), *PUNCTUATION]
