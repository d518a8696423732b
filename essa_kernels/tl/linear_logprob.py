"""Log-probabilities of labels from hidden states and LM head in Triton, accumulated in float32.

The vocabulary goes by in chunks, each in two launches: every block of rows and words makes its logits and leaves
e^(logit - the block's own highest) beside the block's highest and sum; then every block of rows and columns of d folds
the chunk's blocks into sum_v p_v W_v under the running maximum. So a gradient of hidden costs one more product, not a
second look at the logits, and what is in memory of them is one chunk, in the operands' dtype. Without a gradient only
the blocks' highest and sum are left. The head's gradient takes logits again, chunk by chunk, each written once.

Rows of ignored labels are moved behind the others, on the device: nothing waits for their number. Every sum has a fixed
order, so results repeat exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import config, on_device
from .storage import rounded
from .svd_lora import dot

LOWEST = tl.constexpr(-3.4028234663852886e38)
SMALL = tl.constexpr(0.015625)  # below it, series of a few terms are exact to float32


@triton.jit
def tanh(x):
    """About one unit in the last place; the polynomial is Moshier's, of Cephes' tanhf."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    small = p * square * x + x
    large = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(tl.abs(x), 20.0)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def log1p(x):
    """For x in 0 .. 1."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 3.0 - x * (0.25 - x * 0.2))))
    return tl.where(x < SMALL, series, tl.log(1.0 + x))


@triton.jit
def minus_expm1(x):
    """1 - e^x for x <= 0."""
    series = -x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0))))
    return tl.where(x > -SMALL, series, 1.0 - tl.exp(x))


@triton.jit
def cap_slope(logit, outer, CAPPED: tl.constexpr):
    """d logit / d raw in units of outer * inner."""
    slope = tl.full(logit.shape, 1.0, tl.float32)
    if CAPPED:
        bent = logit / outer
        slope = 1.0 - bent * bent
    return slope


@triton.jit
def logits(
    hidden,
    weight,
    bias,
    place,
    inside,
    word,
    vocab,
    d,
    hidden_stride,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Logits of the rows at ``place`` for a block of words: float32 [rows, words]."""
    step = tl.arange(0, INNER)
    hidden_rows = hidden + place[:, None] * hidden_stride
    weight_rows = weight + word.to(tl.int64)[None, :] * d
    raw = tl.zeros((place.shape[0], word.shape[0]), tl.float32)
    for first in range(0, d, INNER):
        column = first + step
        within = column < d
        hidden_block = tl.load(hidden_rows + column[None, :], mask=inside[:, None] & within[None, :], other=0.0)
        weight_block = tl.load(weight_rows + column[:, None], mask=within[:, None] & (word < vocab)[None, :], other=0.0)
        raw = dot(hidden_block, weight_block, raw)
    if HAS_BIAS:
        raw += tl.load(bias + word, mask=word < vocab, other=0.0).to(tl.float32)[None, :]
    if CAPPED:
        raw = tanh(raw * inner)
    return raw * outer


@triton.jit(do_not_specialize=["first_word", "rows", "inner", "outer"])
def blocks_kernel(
    exponentials,
    highest,
    total,
    own,
    hidden,
    weight,
    bias,
    labels,
    order,
    kept,
    first_word,
    vocab,
    d,
    columns,
    rows,
    hidden_stride,
    inner,
    outer,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOPES: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Of a chunk of the vocabulary, by blocks of words: the highest logit but the label's, sum e^(logit - highest)
    without the label, and where SLOPES the terms, times the cap's slope. Grid: row blocks, blocks of words."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(kept)
    if tl.program_id(0) * ROWS >= count:
        return
    inside = row < count
    place = tl.load(order + row, mask=inside, other=0)
    label = tl.load(labels + place, mask=inside, other=0)
    within = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    word = first_word + within
    z = logits(
        hidden, weight, bias, place, inside, word, vocab, d, hidden_stride, inner, outer, CAPPED, HAS_BIAS, INNER
    )
    mine = word[None, :] == label[:, None]
    own_logit = tl.sum(tl.where(mine, z, 0.0), axis=1)
    has_own = (label >= first_word + tl.program_id(1) * WORDS) & (label < first_word + (tl.program_id(1) + 1) * WORDS)
    tl.store(own + row, own_logit, mask=inside & has_own)
    others = (word < vocab)[None, :] & (word[None, :] != label[:, None])
    top = tl.maximum(tl.max(tl.where(others, z, LOWEST), axis=1), LOWEST)  # finite though all logits be -inf
    terms = tl.exp(tl.where(others, z - top[:, None], LOWEST))
    statistic = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(highest + statistic, top, mask=inside)
    tl.store(total + statistic, tl.sum(terms, axis=1), mask=inside)
    if SLOPES:
        terms *= cap_slope(z, outer, CAPPED)
        at = exponentials + row.to(tl.int64)[:, None] * columns + within[None, :]
        tl.store(at, rounded(terms, exponentials.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["first_word", "blocks", "rows"])
def fold_kernel(
    sums,
    new_state,
    state,
    exponentials,
    highest,
    total,
    weight,
    kept,
    first_word,
    blocks,
    vocab,
    d,
    columns,
    rows,
    SLOPES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WORDS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Fold a chunk's blocks into the running maximum and sum, state [2, rows], and sum_v e^(logit - maximum) W_v, sums
    [rows, d]. Grid: row blocks, column blocks of d."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(kept)
    if tl.program_id(0) * ROWS >= count:
        return
    inside = row < count
    top = tl.load(state + row, mask=inside, other=0.0)
    running = tl.load(state + rows + row, mask=inside, other=0.0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = inside[:, None] & (column < d)[None, :]
    sums_at = sums + row.to(tl.int64)[:, None] * d + column[None, :]
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    if SLOPES:
        result = tl.load(sums_at, mask=here, other=0.0)
    highest_at, total_at = highest + row, total + row
    word = first_word + tl.arange(0, INNER)
    terms_at = exponentials + row.to(tl.int64)[:, None] * columns + tl.arange(0, INNER)[None, :]
    for _ in range(blocks):
        block_top = tl.load(highest_at, mask=inside, other=0.0)
        now = tl.maximum(top, block_top)
        shrink, share = tl.exp(top - now), tl.exp(block_top - now)
        running = running * shrink + tl.load(total_at, mask=inside, other=0.0) * share
        top = now
        highest_at += rows
        total_at += rows
        if SLOPES:
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            for _ in range(0, WORDS, INNER):
                terms = tl.load(terms_at, mask=inside[:, None], other=0.0)
                weight_at = weight + word.to(tl.int64)[:, None] * d + column[None, :]
                weight_block = tl.load(weight_at, mask=(word < vocab)[:, None] & (column < d)[None, :], other=0.0)
                product = dot(terms, weight_block, product)
                terms_at += INNER
                word += INNER
            result = result * shrink[:, None] + product * share[:, None]
    if SLOPES:
        tl.store(sums_at, result, mask=here)
    if tl.program_id(1) == 0:
        tl.store(new_state + row, top, mask=inside)
        tl.store(new_state + rows + row, running, mask=inside)


@triton.jit(do_not_specialize=["rows", "outer", "unit"])
def finish_kernel(
    logprob,
    logsumexp,
    slope,
    sums,
    state,
    own,
    weight,
    labels,
    order,
    kept,
    d,
    rows,
    outer,
    unit,
    CAPPED: tl.constexpr,
    SLOPES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Results from what was folded; the label's own term joins here. Grid: row blocks, column blocks of d."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.load(kept)
    place = tl.load(order + row, mask=inside, other=0)
    own_logit = tl.load(own + row, mask=inside, other=0.0)
    highest = tl.load(state + row, mask=inside, other=0.0)
    top = tl.maximum(own_logit, highest)
    shrink = tl.exp(highest - top)
    others, mine = tl.load(state + rows + row, mask=inside, other=0.0) * shrink, tl.exp(own_logit - top)
    every = others + mine
    if tl.program_id(1) == 0:
        confident = -log1p(tl.minimum(others / tl.maximum(mine, others), 1.0))
        result = tl.where(others < mine, confident, own_logit - top - tl.log(every))
        tl.store(logprob + place, result, mask=inside)
        tl.store(logsumexp + place, top + tl.log(every), mask=inside)
    if SLOPES:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        here = inside[:, None] & (column < d)[None, :]
        label = tl.load(labels + place, mask=inside, other=0)
        keep = unit * cap_slope(own_logit, outer, CAPPED) * (others / every)
        share = unit * shrink / every
        own_word = tl.load(weight + label[:, None] * d + column[None, :], mask=here, other=0.0).to(tl.float32)
        folded = tl.load(sums + row.to(tl.int64)[:, None] * d + column[None, :], mask=here, other=0.0)
        result = keep[:, None] * own_word - share[:, None] * folded
        tl.store(slope + place[:, None] * d + column[None, :], rounded(result, slope.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["first_word", "inner", "outer", "unit"])
def gradient_kernel(
    gradient,
    grad,
    logprob,
    logsumexp,
    hidden,
    weight,
    bias,
    labels,
    order,
    kept,
    first_word,
    vocab,
    d,
    columns,
    hidden_stride,
    inner,
    outer,
    unit,
    CAPPED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The gradient of the raw logits of a chunk of the vocabulary. Grid: row blocks, blocks of words."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    count = tl.load(kept)
    if tl.program_id(0) * ROWS >= count:
        return
    inside = row < count
    place = tl.load(order + row, mask=inside, other=0)
    label = tl.load(labels + place, mask=inside, other=0)
    within = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    word = first_word + within
    z = logits(
        hidden, weight, bias, place, inside, word, vocab, d, hidden_stride, inner, outer, CAPPED, HAS_BIAS, INNER
    )
    factor = tl.load(grad + place, mask=inside, other=0.0) * unit
    minus_p = -tl.exp(z - tl.load(logsumexp + place, mask=inside, other=0.0)[:, None])
    one_minus_p = minus_expm1(tl.load(logprob + place, mask=inside, other=0.0))
    result = tl.where(word[None, :] == label[:, None], one_minus_p[:, None], minus_p)
    result = factor[:, None] * (result * cap_slope(z, outer, CAPPED))
    at = gradient + row.to(tl.int64)[:, None] * columns + within[None, :]
    tl.store(at, rounded(result, gradient.dtype.element_ty), mask=inside[:, None])


@triton.jit(do_not_specialize=["first_word"])
def head_kernel(
    d_weight,
    d_bias,
    gradient,
    hidden,
    order,
    kept,
    first_word,
    vocab,
    d,
    columns,
    hidden_stride,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradients of a chunk's weights and biases, from those of its logits. Grid: blocks of words, column blocks of d."""
    within = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    word = first_word + within
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((WORDS, COLUMNS), tl.float32)
    bias_sums = tl.zeros((WORDS,), tl.float32)
    count = tl.load(kept).to(tl.int32)
    for first in range(0, count, INNER):
        row = first + tl.arange(0, INNER)
        inside = row < count
        at = gradient + row.to(tl.int64)[None, :] * columns + within[:, None]
        block = tl.load(at, mask=inside[None, :], other=0.0)
        if HAS_WEIGHT:
            place = tl.load(order + row, mask=inside, other=0)
            hidden_at = hidden + place[:, None] * hidden_stride + column[None, :]
            hidden_block = tl.load(hidden_at, mask=inside[:, None] & (column < d)[None, :], other=0.0)
            if hidden_block.dtype == tl.float16:
                # The gradient has float32's range, and float16 fits into tf32 exactly.
                sums = tl.dot(block, hidden_block.to(tl.float32), sums, input_precision="tf32")
            else:
                sums = dot(block, hidden_block, sums)
        if HAS_BIAS:
            bias_sums += tl.sum(block.to(tl.float32), axis=1)
    if HAS_WEIGHT:
        d_weight_at = d_weight + word.to(tl.int64)[:, None] * d + column[None, :]
        here = (word < vocab)[:, None] & (column < d)[None, :]
        tl.store(d_weight_at, rounded(sums, d_weight.dtype.element_ty), mask=here)
    if HAS_BIAS:
        words = tl.where(tl.program_id(1) == 0, vocab, 0)  # written once
        tl.store(d_bias + word, rounded(bias_sums, d_bias.dtype.element_ty), mask=word < words)


def linear_logprob(
    logprob: Tensor,
    logsumexp: Tensor,
    slope: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """logprob, the logits' logsumexp and slope = d logprob / d hidden of every row whose label is not ignored."""
    (rows, d), vocab = hidden.shape, weight.shape[0]
    inner, outer = _bend(logit_scale, softcap, temperature)
    order, kept = _order(labels, ignore_index)
    shape, fold, finish = (config(hidden, f"logprob_{kernel}") for kernel in ("blocks", "fold", "finish"))
    block_words = shape["block_words_bytes"] // hidden.element_size()
    block_rows, block_columns = (fold[f"block_{side}_bytes"] // hidden.element_size() for side in ("rows", "columns"))
    columns = triton.cdiv(vocab, block_words) * block_words if slope is None else _chunk(hidden, vocab, block_words)
    exponentials = hidden.new_empty((rows, columns) if slope is not None else (1,))
    highest, total = logprob.new_empty(2, columns // block_words, rows)
    sums = logprob.new_zeros((rows, d) if slope is not None else (1,))
    own, state, new_state = logprob.new_empty(rows), logprob.new_zeros(2, rows), logprob.new_empty(2, rows)
    state[0] = LOWEST.value
    fold_grid = (triton.cdiv(rows, block_rows), 1 if slope is None else triton.cdiv(d, block_columns))
    with on_device(hidden):
        for first_word in range(0, vocab, columns):
            blocks = triton.cdiv(min(columns, vocab - first_word), block_words)
            blocks_kernel[(triton.cdiv(rows, shape["block_rows"]), blocks)](
                exponentials,
                highest,
                total,
                own,
                hidden,
                weight,
                weight if bias is None else bias,
                labels,
                order,
                kept,
                first_word,
                vocab,
                d,
                columns,
                rows,
                hidden.stride(0),
                inner,
                outer,
                CAPPED=softcap is not None,
                HAS_BIAS=bias is not None,
                SLOPES=slope is not None,
                ROWS=shape["block_rows"],
                WORDS=block_words,
                INNER=shape["block_inner_bytes"] // hidden.element_size(),
                num_warps=shape["num_warps"],
                num_stages=shape["num_stages"],
                enable_fp_fusion=True,
            )
            fold_kernel[fold_grid](
                sums,
                new_state,
                state,
                exponentials,
                highest,
                total,
                weight,
                kept,
                first_word,
                blocks,
                vocab,
                d,
                columns,
                rows,
                SLOPES=slope is not None,
                ROWS=block_rows,
                COLUMNS=block_columns,
                WORDS=block_words,
                INNER=fold["block_inner_bytes"] // hidden.element_size(),
                num_warps=fold["num_warps_bytes"] // hidden.element_size(),
                num_stages=fold["num_stages"],
                enable_fp_fusion=True,
            )
            state, new_state = new_state, state
        finish_columns = finish["block_columns_bytes"] // hidden.element_size()
        finish_kernel[triton.cdiv(rows, finish["block_rows"]), 1 if slope is None else triton.cdiv(d, finish_columns)](
            logprob,
            logsumexp,
            logprob if slope is None else slope,
            sums,
            state,
            own,
            weight,
            labels,
            order,
            kept,
            d,
            rows,
            outer,
            inner * outer,
            CAPPED=softcap is not None,
            SLOPES=slope is not None,
            ROWS=finish["block_rows"],
            COLUMNS=finish_columns,
            num_warps=finish["num_warps"],
            enable_fp_fusion=True,
        )


def linear_logprob_backward(
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    grad: Tensor,
    slope: Tensor | None,
    logprob: Tensor,
    logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
) -> None:
    """The gradients that are not None, from grad = d loss / d logprob and what `linear_logprob` left."""
    if d_hidden is not None and slope is not None:
        d_hidden.copy_(torch.where((labels != ignore_index)[:, None], grad[:, None] * slope, 0.0))
    if d_weight is None and d_bias is None:
        return
    (rows, d), vocab = hidden.shape, weight.shape[0]
    inner, outer = _bend(logit_scale, softcap, temperature)
    order, kept = _order(labels, ignore_index)
    shape, head = config(hidden, "logprob_blocks"), config(hidden, "logprob_head")
    block_words = shape["block_words_bytes"] // hidden.element_size()
    head_words = head["block_words_bytes"] // hidden.element_size()
    block_columns = head["block_columns_bytes"] // hidden.element_size()
    columns = _chunk(hidden, vocab, max(block_words, head_words))
    # float16 has too little range for the gradient of logits.
    dtype = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
    gradient = hidden.new_empty(rows, columns, dtype=dtype)
    with on_device(hidden):
        for first_word in range(0, vocab, columns):
            words = min(columns, vocab - first_word)
            gradient_kernel[(triton.cdiv(rows, shape["block_rows"]), triton.cdiv(words, block_words))](
                gradient,
                grad,
                logprob,
                logsumexp,
                hidden,
                weight,
                weight if bias is None else bias,
                labels,
                order,
                kept,
                first_word,
                vocab,
                d,
                columns,
                hidden.stride(0),
                inner,
                outer,
                inner * outer,
                CAPPED=softcap is not None,
                HAS_BIAS=bias is not None,
                ROWS=shape["block_rows"],
                WORDS=block_words,
                INNER=shape["block_inner_bytes"] // hidden.element_size(),
                num_warps=shape["num_warps"],
                num_stages=shape["num_stages"],
                enable_fp_fusion=True,
            )
            head_kernel[(triton.cdiv(words, head_words), 1 if d_weight is None else triton.cdiv(d, block_columns))](
                weight if d_weight is None else d_weight,
                weight if d_bias is None else d_bias,
                gradient,
                hidden,
                order,
                kept,
                first_word,
                vocab,
                d,
                columns,
                hidden.stride(0),
                HAS_WEIGHT=d_weight is not None,
                HAS_BIAS=d_bias is not None,
                WORDS=head_words,
                COLUMNS=block_columns,
                INNER=head["block_inner_bytes"] // hidden.element_size(),
                num_warps=head["num_warps"],
                num_stages=head["num_stages"],
                enable_fp_fusion=True,
            )


def _bend(logit_scale: float, softcap: float | None, temperature: float) -> tuple[float, float]:
    """The factors within and outside of the cap."""
    if softcap is None:
        return 1.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def _order(labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The rows, those of ignored labels last, and how many the others are: int64 [rows] and [1]."""
    ignored = labels == ignore_index
    return ignored.to(torch.uint8).sort(stable=True).indices, ignored.logical_not().sum(0, keepdim=True)


def _chunk(hidden: Tensor, vocab: int, block_words: int) -> int:
    """Words of the vocabulary whose terms are in memory at once: whole blocks, fewer where rows are many."""
    shape = config(hidden, "logprob_chunk")
    most = max(shape["elements"] // max(hidden.shape[0], 1), shape["least_words"])
    return min(triton.cdiv(vocab, block_words), max(most // block_words, 1)) * block_words
