"""The fused attentions, for training and for decoding over blocks, with their documented limits."""

from __future__ import annotations

import torch

from torch_npu._bodies import body, differentiable, limit

HALVES = (torch.float16, torch.bfloat16)
MASK_SIDE = 2048
MAX_SEQUENCES = 1024  # of packed ones in a call
CAUSAL_AT_THE_FIRST = 2
CAUSAL_AT_THE_LAST = 3
COMPRESSED = (CAUSAL_AT_THE_FIRST, CAUSAL_AT_THE_LAST)
LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
MOST_ELEMENTS = 2**31 - 1


def _attend(query, key, value, scale, hidden):
    """query [heads, q, D], key and value [kv heads, k, D]; `hidden` [q, k]: True is not seen."""
    times = query.shape[0] // key.shape[0]
    keys = key.repeat_interleave(times, 0).float()
    values = value.repeat_interleave(times, 0).float()
    scores = query.float() @ keys.transpose(-1, -2) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ values).to(query.dtype)


def _hidden(queries, keys, mode, mask):
    """Which key each query does not see. Without a mask every key is seen, whatever the mode."""
    if mask is None:
        return None
    if mode not in COMPRESSED:
        return mask
    last_seen = torch.arange(queries)
    if mode == CAUSAL_AT_THE_LAST:
        last_seen += keys - queries
    return torch.arange(keys)[None] > last_seen[:, None]


def _check_mask(mask, mode):
    if mask is None or mode not in COMPRESSED:
        return
    limit(tuple(mask.shape[-2:]) == (MASK_SIDE, MASK_SIDE), f"a compressed mask of {mask.shape}")
    limit(mask.dtype in (torch.bool, torch.uint8), f"a mask of {mask.dtype}")
    upper = torch.ones(MASK_SIDE, MASK_SIDE, dtype=torch.bool).triu(1)
    limit(torch.equal(mask.bool(), upper), "the compressed mask is not the upper triangle")


def _packed(query, key, value, scale, q_ends, k_ends, mode, mask):
    """TND: sequences end to end, cumulative ends without a leading 0."""
    limit(bool(q_ends) and bool(k_ends), "TND needs actual_seq_qlen and actual_seq_kvlen")
    limit(len(q_ends) == len(k_ends), f"{len(q_ends)} ends of queries, {len(k_ends)} of keys")
    limit(len(q_ends) <= MAX_SEQUENCES, f"{len(q_ends)} sequences in one call")
    limit(q_ends[-1] == len(query), f"queries end at {q_ends[-1]} of {len(query)}")
    limit(k_ends[-1] == len(key), f"keys end at {k_ends[-1]} of {len(key)}")
    limit(sorted(q_ends) == list(q_ends) and sorted(k_ends) == list(k_ends), "ends must grow")
    outputs = []
    q_first = 0
    k_first = 0
    for q_end, k_end in zip(q_ends, k_ends, strict=True):
        queries = query[q_first:q_end].transpose(0, 1)
        keys = key[k_first:k_end].transpose(0, 1)
        values = value[k_first:k_end].transpose(0, 1)
        hidden = _hidden(q_end - q_first, k_end - k_first, mode, mask)
        outputs.append(_attend(queries, keys, values, scale, hidden).transpose(0, 1))
        q_first = q_end
        k_first = k_end
    return torch.cat(outputs)


def _batched(query, key, value, heads, scale, mode, mask):
    """SBH: [tokens, batch, heads * D]."""
    tokens, batch, width = query.shape

    def by_head(x):
        return x.view(len(x), batch, -1, width // heads).permute(1, 2, 0, 3)

    hidden = _hidden(tokens, len(key), mode, mask)
    outputs = []
    for q, k, v in zip(by_head(query), by_head(key), by_head(value), strict=True):
        outputs.append(_attend(q, k, v, scale, hidden))
    return torch.stack(outputs).permute(2, 0, 1, 3).reshape(tokens, batch, width)


@differentiable("query", "key", "value")
def npu_fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=2147483647,
    next_tockens=2147483647,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    gen_mask_parallel=True,
    sync=False,
    softmax_layout="",
    sink=None,
    dropout_mask=None,
    seed=0,
    offset=0,
):
    """Training attention; only the first output is what the hardware gives."""
    plain = keep_prob == 1.0 and pse is None and prefix is None and sink is None
    limit(plain, "dropout, pse, prefix and sink are not played here")
    limit(query.dtype == key.dtype == value.dtype, "query, key and value differ in type")
    limit(query.shape[-1] <= 768, f"head size {query.shape[-1]}")
    limit(key.shape == value.shape, f"keys {key.shape}, values {value.shape}")
    _check_mask(atten_mask, sparse_mode)
    if input_layout == "TND":
        limit(head_num == query.shape[1], f"head_num {head_num} of {query.shape[1]} heads")
        limit(query.shape[1] % key.shape[1] == 0, f"{query.shape[1]} heads, {key.shape[1]} of keys")
        ends = (actual_seq_qlen, actual_seq_kvlen)
        output = _packed(query, key, value, scale, *ends, sparse_mode, atten_mask)
    elif input_layout == "SBH":
        output = _batched(query, key, value, head_num, scale, sparse_mode, atten_mask)
    else:  # the hardware has more layouts; neither we nor MindSpeed call them
        raise NotImplementedError(f"npu_standin: input_layout {input_layout}")
    nothing = query.new_empty(0)
    return output, nothing, nothing.clone(), nothing.clone(), 0, 0, 0


def _blocks(cache, kv_heads, block_size):
    """A cache as [blocks, kv heads, block, D], from either documented layout."""
    if cache.dim() == 4:
        limit(cache.shape[1] == kv_heads, f"num_key_value_heads {kv_heads}, cache {cache.shape}")
        limit(cache.shape[2] == block_size, f"block_size {block_size}, cache {cache.shape}")
        return cache
    limit(cache.shape[1] == block_size, f"block_size {block_size}, cache {cache.shape}")
    limit(cache.shape[2] <= 65535, f"{cache.shape[2]} elements of a token in the cache")
    by_head = cache.view(len(cache), block_size, kv_heads, -1)
    return by_head.transpose(1, 2)


@body
def npu_fused_infer_attention_score(
    query,
    key,
    value,
    *,
    actual_seq_lengths_kv=None,
    block_table=None,
    num_heads=1,
    scale=1.0,
    input_layout="BSH",
    num_key_value_heads=0,
    sparse_mode=0,
    block_size=0,
    **others,
):
    """Decoding over blocks: one query a row, which sees the first tokens of the row's blocks."""
    limit(not any(value is not None for value in _tensors(others)), f"only plain calls: {others}")
    limit(block_table is not None, "only decoding by blocks is played here")
    limit(query.dtype in HALVES, f"the inference attention takes fp16 or bf16, not {query.dtype}")
    limit(query.dtype == key.dtype == value.dtype, "query and cache differ in type")
    limit(query.is_contiguous() and key.is_contiguous() and value.is_contiguous(), "not contiguous")
    if input_layout == "BSND":
        query = query.transpose(1, 2)
    elif input_layout != "BNSD":  # as above
        raise NotImplementedError(f"npu_standin: input_layout {input_layout}")
    rows, heads, tokens, dim = query.shape
    num_key_value_heads = num_key_value_heads or num_heads
    limit(key.shape == value.shape, f"keys {key.shape}, values {value.shape}")
    limit(heads % num_key_value_heads == 0, f"{heads} heads over {num_key_value_heads}")
    limit(tokens == 1, f"{tokens} queries a row")
    limit(heads == num_heads <= 256, f"num_heads {num_heads}, query {query.shape}")
    limit(heads // num_key_value_heads <= 64, f"{heads} heads over {num_key_value_heads}")
    limit(dim % 16 == 0 and dim <= 512, f"head size {dim}: a multiple of 16, at most 512")
    limit(block_size % 16 == 0 and 0 < block_size <= 512, f"block size {block_size}")
    _check_table(block_table, actual_seq_lengths_kv, rows, block_size)
    keys = _blocks(key, num_key_value_heads, block_size)
    values = _blocks(value, num_key_value_heads, block_size)
    outputs = []
    for row, length in enumerate(actual_seq_lengths_kv):
        k = _tokens(keys, block_table[row], length)
        v = _tokens(values, block_table[row], length)
        outputs.append(_attend(query[row], k, v, scale, None))
    output = torch.stack(outputs)
    if input_layout == "BSND":
        output = output.transpose(1, 2).contiguous()
    return output, query.new_empty(0)


@body
def npu_fused_infer_attention_score_v2(
    query,
    key,
    value,
    *,
    query_rope=None,
    key_rope=None,
    actual_seq_kvlen=None,
    block_table=None,
    num_query_heads=1,
    num_key_value_heads=0,
    softmax_scale=1.0,
    input_layout="BSH",
    sparse_mode=0,
    block_size=0,
    return_softmax_lse=False,
    **others,
):
    """Decoding over blocks with latent attention: one query a row, whose score has two parts, sees the
    first tokens of the row's blocks, whose latents are both keys and values.

    The documentation also wants as many blocks in the cache as all rows have together. That is not
    held to: rows may share blocks, and nothing in the published sources looks at it.
    """
    limit(not any(value is not None for value in _tensors(others)), f"only plain calls: {others}")
    limit(query_rope is not None and key_rope is not None, "only latent attention is played here")
    limit(block_table is not None, "latent attention needs a block_table")
    tensors = (query, key, value, query_rope, key_rope)
    limit(query.dtype in HALVES, f"the inference attention takes fp16 or bf16, not {query.dtype}")
    limit(len({x.dtype for x in tensors}) == 1, "query and cache differ in type")
    limit(all(x.is_contiguous() for x in tensors), "not contiguous")
    if input_layout not in ("BNSD", "BNSD_NBSD"):  # as above
        raise NotImplementedError(f"npu_standin: input_layout {input_layout}")
    rows, heads, tokens, rank = query.shape
    limit(rank == 512, f"latents of {rank} columns, and only 512 are taken")
    limit(query_rope.shape == (rows, heads, tokens, 64), f"query_rope {query_rope.shape}")
    limit(tokens == 1, f"{tokens} queries a row")
    limit(sparse_mode == 0, f"sparse_mode {sparse_mode} with one query a row")
    limit(not return_softmax_lse, "softmax_lse is not played here")
    limit(heads == num_query_heads, f"num_query_heads {num_query_heads}, query {query.shape}")
    limit(heads in LATENT_HEADS, f"{heads} heads, and only {LATENT_HEADS} are taken")
    limit(num_key_value_heads == 1, f"{num_key_value_heads} kv heads of latent attention")
    limit(block_size in (16, 128), f"block size {block_size}: 16 or 128")
    limit(key.shape == value.shape, f"keys {key.shape}, values {value.shape}")
    limit(key.numel() <= MOST_ELEMENTS, f"a cache of {key.numel()} elements")
    limit(key_rope.shape == (*key.shape[:-1], 64), f"keys {key.shape}, key_rope {key_rope.shape}")
    _check_table(block_table, actual_seq_kvlen, rows, block_size)
    latents = _blocks(value, 1, block_size)
    limit(latents.shape[-1] == rank, f"latents {value.shape} for queries {query.shape}")
    keys = torch.cat([_blocks(key, 1, block_size), _blocks(key_rope, 1, block_size)], dim=-1)
    queries = torch.cat([query, query_rope], dim=-1)
    outputs = []
    for row, length in enumerate(actual_seq_kvlen):
        k = _tokens(keys, block_table[row], length)
        v = _tokens(latents, block_table[row], length)
        outputs.append(_attend(queries[row], k, v, softmax_scale, None))
    output = torch.stack(outputs)
    if input_layout == "BNSD_NBSD":
        output = output.transpose(0, 1).contiguous()
    return output, query.new_empty(0, dtype=torch.float32)


def _check_table(block_table, lengths, rows, block_size):
    limit(block_table.dtype == torch.int32, f"block_table is {block_table.dtype}")
    limit(block_table.dim() == 2, f"block_table has {block_table.dim()} axes")
    limit(max(lengths) <= 262144, f"{max(lengths)} tokens of a row")
    limit(len(block_table) == rows, f"block_table of {len(block_table)} for {rows} rows")
    limit(len(lengths) == rows, f"{len(lengths)} lengths, {rows} rows")
    limit(max(lengths) <= block_table.shape[1] * block_size, "the block table is too narrow")


def _tokens(cache, table, length):
    """The first tokens of a row: cache [blocks, kv heads, block, D] -> [kv heads, length, D]."""
    used = table[: -(-length // cache.shape[2])].long()
    return cache[used].transpose(0, 1).flatten(1, 2)[:, :length]


def _tensors(values):
    return [value for value in values.values() if isinstance(value, torch.Tensor)]
