"""Documents in, batches of segments out."""

from .bytes import START, VOCABULARY, decode, encode
from .corpora import Document, fingerprint, held_out_split, read_documents, standard_library
from .lanes import Lanes
from .yardsticks import order2_bits_per_byte, xz_bits_per_byte

__all__ = [
    "START",
    "VOCABULARY",
    "Document",
    "Lanes",
    "decode",
    "encode",
    "fingerprint",
    "held_out_split",
    "order2_bits_per_byte",
    "read_documents",
    "standard_library",
    "xz_bits_per_byte",
]
