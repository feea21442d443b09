"""Where the documents of a batch lie."""

import torch

from .dilated_operator import find_documents  # noqa


def is_packed(document_ids):
    if document_ids is None or torch.compiler.is_compiling():
        return False
    first = document_ids.masked_fill(document_ids < 0, torch.iinfo(document_ids.dtype).max).amin(1)
    return bool((document_ids.amax(1) > first).any())
