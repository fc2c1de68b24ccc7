"""Split-KV paged decode attention, which reads the cache once.

For a Δ-layer it also writes its logits, 4 · Hq bytes a token, since page scores need the final
log-sum-exp. Logits and log-sum-exps are in base 2: exp2 is what the hardware has.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Two pairs of float8 numbers to the first of both, and the second of both, as float16.
_TAKE_APART = tl.constexpr("""{
    .reg .b32 bytes;
    .reg .b16 two, none;
    prmt.b32 bytes, $2, 0, 0x4420;
    mov.b32 {two, none}, bytes;
    cvt.rn.f16x2.e4m3x2 $0, two;
    prmt.b32 bytes, $2, 0, 0x4431;
    mov.b32 {two, none}, bytes;
    cvt.rn.f16x2.e4m3x2 $1, two;
}""")


@triton.jit
def _selected_blocks(table_ptr, ids_ptr, count, width, PAGE: tl.constexpr, BLOCK: tl.constexpr,
                     LISTED: tl.constexpr):  # fmt: skip
    """The first LISTED of a row's selected pages, and the blocks they lie in.

    Both are loaded before the loop over tokens: two loads, one behind the other, would have to come
    before every tile of keys, which then could not be fetched so far ahead.
    """
    place = tl.arange(0, LISTED)
    # Does not wait for the count; what lies beyond it is no page.
    page = tl.load(ids_ptr + place, mask=place < width, other=0)
    page = tl.where(place < count, page, 0)
    block = tl.load(table_ptr + page * PAGE // BLOCK, mask=place < count, other=0)
    return page, block


@triton.jit
def _selected_tokens(ids_ptr, count, n, PAGE: tl.constexpr):
    """Tokens of the selected pages of a row of ``n``; the last one of all may be partial."""
    end = tl.load(ids_ptr + count - 1, mask=count > 0, other=-1) * PAGE + PAGE
    return tl.maximum(count, 0) * PAGE - tl.maximum(end - n, 0)


@triton.jit
def _logits(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """Base-2 logits of q · k (R7)."""
    if not SOFTCAP:
        return scores * (scale * LOG2E)
    scores = scores * scale
    # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends, where e^2x is 0 or inf.
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E / softcap)))) * LOG2E


@triton.jit
def _take_apart(pairs, OPERAND: tl.constexpr):
    """Two float8 numbers of each int16: the even ones of a row, and the odd ones."""
    if tl.float16 == OPERAND:
        even, odd = tl.inline_asm_elementwise(
            _TAKE_APART, "=r,=r,r", [pairs], (tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:  # the interpreter
        even = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(OPERAND)
        odd = ((pairs >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(OPERAND)
    return even, odd


@triton.jit
def _tiles(
    q, highest, total, acc, first, last, length, pages, blocks, page_0, table_ptr, k_ptr, v_ptr,
    ks_ptr, vs_ptr, logits_ptr, k_block, k_slot, v_block, v_slot, s_block, s_slot, width, scale,
    softcap, line, real, dim, in_head,
    PAGE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, SPARSE: tl.constexpr,
    SCORES: tl.constexpr, SOFTCAP: tl.constexpr, OPERAND: tl.constexpr, LISTED: tl.constexpr,
    PAIRS: tl.constexpr, SCALED: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Attend to the tokens ``first`` to ``last``, of a row or of its selected pages.

    ``pages`` and ``blocks`` [LISTED] are of the selected pages from the ``page_0``-th on. With
    PAIRS values are read two at a time, and ``acc`` is of even numbers and of odd ones: matrix
    products want tokens side by side, and single bytes of several tokens are slow to gather.
    """
    for start in range(first, last, TILE):
        index = start + tl.arange(0, TILE)
        valid = index < length
        token = index
        if SPARSE:
            place = tl.minimum(index // PAGE - page_0, LISTED - 1)
            if PAGE != BLOCK:
                token = tl.gather(pages, place, 0) * PAGE + index % PAGE
            block = tl.gather(blocks, place, 0).to(tl.int64)
        else:
            block = tl.load(table_ptr + token // BLOCK, mask=valid, other=0).to(tl.int64)
        # Tiles that begin with a block have the same slots, which are worked out once.
        if TILE % BLOCK == 0 and (PAGE == BLOCK or not SPARSE):
            slot = (tl.arange(0, TILE) % BLOCK).to(tl.int64)
        else:
            slot = (token % BLOCK).to(tl.int64)
        held = valid[:, None] & in_head[None, :]
        k_at = block * k_block + slot * k_slot
        k = tl.load(k_ptr + k_at[:, None] + dim[None, :], mask=held, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(OPERAND)), input_precision="ieee")
        if SCALED:
            s_at = block * s_block + slot * s_slot
            scores *= tl.load(ks_ptr + s_at, mask=valid, other=0.0).to(tl.float32)[None, :]
        scores = _logits(scores, scale, softcap, SOFTCAP)
        if SCORES:
            at = line.to(tl.int64)[:, None] * width + token[None, :]
            tl.store(logits_ptr + at, scores, mask=real[:, None] & valid[None, :])
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A tile can hold the missing end of a partial page and nothing else.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        if len(total.shape) == 2:
            total = total * shrink[:, None] + weights
        else:
            total = total * shrink + tl.sum(weights, 1)
        # Addresses take as much time as products do.
        v_at = k_at if ALIKE else block * v_block + slot * v_slot
        if SCALED:
            weights *= tl.load(vs_ptr + s_at, mask=valid, other=0.0).to(tl.float32)[None, :]
        weights = weights.to(OPERAND)
        if PAIRS > 0:
            pair = tl.arange(0, PAIRS)
            at = v_ptr.to(tl.pointer_type(tl.int16)) + (v_at // 2)[:, None] + pair[None, :]
            even, odd = _take_apart(tl.load(at, mask=valid[:, None], other=0), OPERAND)
            evens, odds = acc
            evens = tl.dot(weights, even, evens * shrink[:, None], input_precision="ieee")
            odds = tl.dot(weights, odd, odds * shrink[:, None], input_precision="ieee")
            acc = (evens, odds)
        else:
            v = tl.load(v_ptr + v_at[:, None] + dim[None, :], mask=held, other=0.0)
            acc = tl.dot(weights, v.to(OPERAND), acc * shrink[:, None], input_precision="ieee")
        highest = higher
    return highest, total, acc


@triton.jit
def _drafts(
    q, highest, total, acc, first, last, seen, table_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, logits_ptr,
    k_block, k_slot, v_block, v_slot, s_block, s_slot, width, scale, softcap, line, real, dim,
    in_head,
    MOST: tl.constexpr, BLOCK: tl.constexpr, SCORES: tl.constexpr, SOFTCAP: tl.constexpr,
    OPERAND: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Attend to the MOST tokens, at most, that only some of the queries see: their own ``seen``.

    One by one and without matrix products: those multiply a value that a query does not see by 0,
    which NaN does not mind.
    """
    for place in tl.static_range(MOST):
        token = first + place
        exists = token < last
        sees = exists & (token < seen)
        block = tl.load(table_ptr + token // BLOCK, mask=exists, other=0).to(tl.int64)
        slot = (token % BLOCK).to(tl.int64)
        held = exists & in_head
        k = tl.load(k_ptr + block * k_block + slot * k_slot + dim, mask=held, other=0.0)
        k = k.to(OPERAND).to(tl.float32)
        scores = tl.sum(q.to(tl.float32) * k[None, :], 1)
        if SCALED:
            s_at = block * s_block + slot * s_slot
            scores *= tl.load(ks_ptr + s_at, mask=exists, other=0.0).to(tl.float32)
        scores = _logits(scores, scale, softcap, SOFTCAP)
        if SCORES:
            tl.store(logits_ptr + line.to(tl.int64) * width + token, scores, mask=real & sees)
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(highest, scores)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base)
        shrink = tl.exp2(highest - base)
        total = total * shrink + weights
        v = tl.load(v_ptr + block * v_block + slot * v_slot + dim, mask=held, other=0.0)
        if SCALED:
            weights *= tl.load(vs_ptr + s_at, mask=exists, other=0.0).to(tl.float32)
        value = weights[:, None] * v.to(OPERAND).to(tl.float32)[None, :]
        acc = acc * shrink[:, None] + tl.where(sees[:, None], value, 0.0)
        highest = higher
    return highest, total, acc


@triton.jit
def attend(
    q_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, lens_ptr, ids_ptr, counts_ptr, sinks_ptr,
    out_ptr, part_ptr, lse_ptr, logits_ptr,
    q_row, q_token, q_head, k_block, k_slot, k_head, v_block, v_slot, v_head,
    s_block, s_slot, s_head, table_row, ids_row, width, scale, softcap, v_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    TOKENS: tl.constexpr, PACKED: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, SPARSE: tl.constexpr, SCORES: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, OPERAND: tl.constexpr, WIDTH: tl.constexpr,
    LISTED: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr, LAST: tl.constexpr,
    SCALED: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """One KV head of one row, one of SPLITS parts of its tokens; grid (Hkv, SPLITS, B * turns).

    A row has TOKENS queries, which see one token more each. PACKED of them at a time, in as many
    turns as that takes, stand beside the heads in one tile, so that its keys are read once. All see
    the first n tokens; what the last of them see besides are the drafts.

    Of a row's WIDTH page ids, LISTED are kept at a time, for STEP tokens; all, where STEP is 0.

    With SCALED, each token and KV head has a scale of its keys and one of its values. ALIKE:
    values lie in their cache as keys do in theirs.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    turns: tl.constexpr = (TOKENS + PACKED - 1) // PACKED
    row = tl.program_id(2).to(tl.int64) // turns
    query = tl.program_id(2) % turns * PACKED
    tokens = tl.load(lens_ptr + row)
    n = tokens - (TOKENS - 1) + query
    seen = n
    if TOKENS > 1:
        n = tl.maximum(n, 0)
    length = n
    table_ptr += row * table_row
    q_ptr += row * q_row + query * q_token
    row = row * TOKENS + query  # of the outputs
    if SPARSE:
        count = tl.load(counts_ptr + row)
        ids_ptr += row * ids_row
        # Fewer than no pages stands for all of them.
        length = tl.where(count < 0, n, _selected_tokens(ids_ptr, count, n, PAGE))
        if STEP == 0:
            pages, blocks = _selected_blocks(table_ptr, ids_ptr, count, WIDTH, PAGE, BLOCK, LISTED)
    k_ptr += kv_head.to(tl.int64) * k_head
    v_ptr += kv_head.to(tl.int64) * v_head
    ks_ptr += kv_head.to(tl.int64) * s_head
    vs_ptr += kv_head.to(tl.int64) * s_head

    group = tl.arange(0, GROUP_PAD)
    dim = tl.arange(0, DIM_PAD)
    head = kv_head * GROUP + group % GROUP
    packed = group // GROUP
    real = (packed < PACKED) & (query + packed < TOKENS)
    line = packed * HEADS + head
    in_head = dim < DIM
    q = tl.load(
        q_ptr + packed[:, None] * q_token + head[:, None] * q_head + dim[None, :],
        mask=real[:, None] & in_head[None, :],
        other=0.0,
    ).to(OPERAND)
    highest = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    if PACKED > 1:
        # By the token in a tile: so many lines are summed up once, at the end.
        total = tl.zeros([GROUP_PAD, TILE], tl.float32)
    else:
        total = tl.zeros([GROUP_PAD], tl.float32)
    if PAIRS > 0:
        acc = (tl.zeros([GROUP_PAD, PAIRS], tl.float32), tl.zeros([GROUP_PAD, PAIRS], tl.float32))
    else:
        acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)

    # A row's tiles are dealt out by its own length alone, so that no other row has a say.
    per_split = tl.cdiv(tl.cdiv(length, TILE), SPLITS)
    first = split * per_split * TILE
    last = tl.minimum(first + per_split * TILE, length)
    # Whose logits are kept, and in which line.
    kept, kept_at = real, line
    if LAST:
        kept, kept_at = real & (query + packed == TOKENS - 1), head
        logits_ptr += row // TOKENS * HEADS * width
    else:
        logits_ptr += row * HEADS * width
    if SPARSE:
        if count >= 0:
            if STEP == 0:
                highest, total, acc = _tiles(
                    q, highest, total, acc, first, last, length, pages, blocks, 0, table_ptr,
                    k_ptr, v_ptr, ks_ptr, vs_ptr, logits_ptr, k_block, k_slot, v_block, v_slot,
                    s_block, s_slot, width, scale, softcap, kept_at, kept, dim, in_head, PAGE,
                    BLOCK, TILE, True, SCORES, SOFTCAP, OPERAND, LISTED, PAIRS, SCALED, ALIKE,
                )  # fmt: skip
            else:
                for start in range(first, last, STEP):
                    page_0 = start // PAGE
                    pages, blocks = _selected_blocks(
                        table_ptr, ids_ptr + page_0, count - page_0, WIDTH - page_0, PAGE, BLOCK,
                        LISTED,
                    )  # fmt: skip
                    highest, total, acc = _tiles(
                        q, highest, total, acc, start, tl.minimum(start + STEP, last), length,
                        pages, blocks, page_0, table_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, logits_ptr,
                        k_block, k_slot, v_block, v_slot, s_block, s_slot, width, scale, softcap,
                        kept_at, kept, dim, in_head, PAGE, BLOCK, TILE, True, SCORES, SOFTCAP,
                        OPERAND, LISTED, PAIRS, SCALED, ALIKE,
                    )  # fmt: skip
        else:
            highest, total, acc = _tiles(
                q, highest, total, acc, first, last, length, 0, 0, 0, table_ptr, k_ptr, v_ptr,
                ks_ptr, vs_ptr, logits_ptr, k_block, k_slot, v_block, v_slot, s_block, s_slot,
                width, scale, softcap, kept_at, kept, dim, in_head, PAGE, BLOCK, TILE, False,
                SCORES, SOFTCAP, OPERAND, LISTED, PAIRS, SCALED, ALIKE,
            )  # fmt: skip
    else:
        highest, total, acc = _tiles(
            q, highest, total, acc, first, last, length, 0, 0, 0, table_ptr, k_ptr, v_ptr,
            ks_ptr, vs_ptr, logits_ptr, k_block, k_slot, v_block, v_slot, s_block, s_slot, width,
            scale, softcap, kept_at, kept, dim, in_head, PAGE, BLOCK, TILE, False, SCORES, SOFTCAP,
            OPERAND, LISTED, PAIRS, SCALED, ALIKE,
        )  # fmt: skip

    if PAIRS > 0:
        evens, odds = acc
        acc = tl.interleave(evens, odds)
    if PACKED > 1:
        total = tl.sum(total, 1)
        if split == SPLITS - 1:
            last = tl.minimum(seen + (PACKED - 1), tokens)
            highest, total, acc = _drafts(
                q, highest, total, acc, n, last, seen + packed, table_ptr, k_ptr, v_ptr, ks_ptr,
                vs_ptr, logits_ptr, k_block, k_slot, v_block, v_slot, s_block, s_slot, width, scale,
                softcap, kept_at, kept, dim, in_head, PACKED - 1, BLOCK, SCORES, SOFTCAP, OPERAND,
                SCALED,
            )  # fmt: skip
    at_head = row * HEADS + line
    if SPLITS > 1 or SCORES:
        lse = tl.where(total == 0.0, float("-inf"), highest + tl.log2(total))
        tl.store(lse_ptr + at_head * SPLITS + split, lse, mask=real)
    stored = real[:, None] & in_head[None, :]
    if SPLITS > 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        at = (at_head * SPLITS + split)[:, None] * DIM + dim[None, :]
        tl.store(part_ptr + at, acc, mask=stored)
    else:
        if SINKS:
            sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2E
            # With the sink far above every logit the quotient goes to 0, as it should.
            above = tl.maximum(highest, sink)
            total = total * tl.exp2(highest - above) + tl.exp2(sink - above)
            acc = acc * tl.exp2(highest - above)[:, None]
        acc = acc * (v_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        at = at_head[:, None] * DIM + dim[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=stored)
