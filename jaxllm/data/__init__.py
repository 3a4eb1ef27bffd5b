"""Text in: corpora, tokenizers, packing, calibration sets, batches, conversations."""

from jaxllm.data.calibration import Calibration, calibrate
from jaxllm.data.chat import pack_chats, render_chat, render_text
from jaxllm.data.corpora import Corpus, documents, from_texts
from jaxllm.data.instructions import (
    Preference,
    load_conversations,
    load_preferences,
)
from jaxllm.data.loader import Batches, batches
from jaxllm.data.packing import Rows, pack, pack_rows
from jaxllm.data.token_cache import TokenStream, tokenise
from jaxllm.data.tokenizers import Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "Batches",
    "Calibration",
    "Corpus",
    "Preference",
    "Rows",
    "TokenStream",
    "Tokenizer",
    "batches",
    "calibrate",
    "check_vocabulary",
    "documents",
    "from_texts",
    "load_conversations",
    "load_preferences",
    "load_tokenizer",
    "pack",
    "pack_chats",
    "pack_rows",
    "render_chat",
    "render_text",
    "tokenise",
]
