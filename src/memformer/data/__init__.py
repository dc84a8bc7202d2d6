"""Documents in, batches of segments out."""

from .corpora import check_documents, encode_documents, fingerprint, from_rows, read_documents, standard_library
from .documents import Document, Tokens
from .held_out import held_out_split
from .lanes import Lanes
from .objectives import Mixture, Objective
from .tokenfiles import TokenFiles, open_tokens, write_tokens
from .tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    TextDecoder,
    TokenIds,
    Tokenizer,
    decoder_behind,
    load_tokenizer,
    tokenizer_fingerprint,
)
from .yardsticks import order2_bits_per_byte, xz_bits_per_byte

__all__ = [
    "BPETokenizer",
    "ByteTokenizer",
    "Document",
    "Lanes",
    "Mixture",
    "Objective",
    "TextDecoder",
    "TokenFiles",
    "TokenIds",
    "Tokenizer",
    "Tokens",
    "check_documents",
    "decoder_behind",
    "encode_documents",
    "fingerprint",
    "from_rows",
    "held_out_split",
    "load_tokenizer",
    "open_tokens",
    "order2_bits_per_byte",
    "read_documents",
    "standard_library",
    "tokenizer_fingerprint",
    "write_tokens",
    "xz_bits_per_byte",
]
