"""The tokenizer: load it, graft a language onto it, prove the graft, measure it.

Owns everything between text and ids. Does not know conversations, templates or models. First step of the road.
"""

from graftlm.text.tokenizer.base import train_base_tokenizer
from graftlm.text.tokenizer.check import check_tokenizers
from graftlm.text.tokenizer.compression import tokenizer_report
from graftlm.text.tokenizer.graft import GraftReport, graft_tokenizer
from graftlm.text.tokenizer.load import load_tokenizer
from graftlm.text.tokenizer.tokenizer import TOKENIZER_FILES, Tokenizer

__all__ = [
    "TOKENIZER_FILES",
    "GraftReport",
    "Tokenizer",
    "check_tokenizers",
    "graft_tokenizer",
    "load_tokenizer",
    "tokenizer_report",
    "train_base_tokenizer",
]
