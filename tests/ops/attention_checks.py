"""decode_attention of one backend, on the cases of ``ops_oracle``."""

import pytest
import torch
from ops_oracle import close, pack

from deltadecode import ops


def full(case, backend):
    out, scores = ops.decode_attention(
        *case.arguments, **case.options, return_page_scores=True, backend=backend
    )
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    assert scores.shape == (case.q.shape[0], case.pages)
    assert scores.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    dense = ops.decode_attention(*case.arguments, **case.options, backend=backend)
    return out, scores, dense


def sparse(case, pages, backend, width=None):
    ids, counts = pack(pages, width or max([len(p) for p in pages] + [1]))
    return ops.decode_attention(
        *case.arguments, **case.options, page_ids=ids, page_counts=counts, backend=backend
    )


def refused(case, backend):
    """Whether a backend does not take the type of a case; it then has to say so."""
    if backend != "triton" or case.q.dtype != torch.float64:
        return False
    with pytest.raises(ValueError, match=r"'triton' takes bfloat16, .*, got float64"):
        full(case, backend)
    return True


def check(case, backend):
    if refused(case, backend):
        return
    expected, expected_scores = case.attend()
    out, scores, dense = full(case, backend)
    close(out, expected, case.q.dtype)
    close(dense, expected, case.q.dtype)
    # Scores come from float32 arithmetic whatever the input: page choice depends on them.
    close(scores, expected_scores, torch.promote_types(case.q.dtype, torch.float32))
