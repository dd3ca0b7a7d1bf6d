"""The kinds of questions the shipped dialogues are made of: fact tables, phrasings and the split.

Owns: every generated row of `examples/data/`. Does not know: files, tokenizers, models, or `graftlm` itself.
Place on the road: before it; `examples/make_data.py` writes the files the recipes of this repository read.
"""
