"""First and last kernels of a captured step: from the host's parameters to inputs, and back.

A captured step cannot be told anything when it is launched. The host writes what the step needs
into one *slot* of pinned memory, and the step's first kernel reads it over the bus; the last one
writes the sampled ids back in the same way. Neither needs a copy or an event, so the host launches
a step and learns its result without a single call into CUDA but the launch.

    slot = launch_count % num_slots                                (the device counts by itself)

    _begin_kernel   grid (1,)            block table and sampler settings updated in place;
                                         lengths, rows and, if everybody decodes, tokens
    _tokens_kernel  grid (T / BLOCK,)    ids, positions and KV slots of a mixed step's tokens
    _finish_kernel  grid (1,)            last tokens, results, launch_count += 1

A slot of the parameters, int32 words (`StepSlotLayout`):

| words                  | content                                                              |
|------------------------|----------------------------------------------------------------------|
| 16                     | sequences n, decoding nd, tokens, table entries, settings, ids,      |
|                        | prefix groups                                                        |
| 5 x S                  | row, query_len, first position, is_sampling, tokens of the prefix    |
|                        | that its group reads, of each sequence                               |
| G, G + 1, S            | prefix groups: lengths in tokens, first members, members             |
| T                      | token ids, -1 (and past the ids): the row's last sampled token       |
| 2 x U                  | changed entries of the flat block table: index, block id             |
| S x (1 + words)        | changed rows of the sampler's settings: row, then its words          |

Results: [num_slots, S] int64, `tag << 32 | token id` with tag = launch_count + 1 (mod 2^31): the
host sees by the tags when all entries of a step are there, in whatever order they arrive. Eight
bytes are stored at once, so tag and id belong together.

| argument          | shape, dtype                 | duty                                          |
|-------------------|------------------------------|-----------------------------------------------|
| params_ptr        | [num_slots, slot words] int32| pinned host memory                            |
| launch_count_ptr  | [1] int32                    | counts captured steps on the device           |
| table_ptr         | [S + 1, max_blocks] int32    | contiguous; row S is padding's                |
| settings_ptr      | [S + 1, words] int32         | contiguous                                    |
| last_ids_ptr      | [S + 1] int64                | newest token of each row                      |
| results_ptr       | [num_slots, S] int64         | pinned host memory, written                   |

Everything is integers; there is nothing to round. One program does what is ordered by its barrier:
entries of the block table are stored before the sequences look theirs up. No size is constexpr but
`block_size`: one compilation serves all buckets and engines. Offsets into the table are int32,
which holds S x max_blocks.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.kernels.captured_inputs import CapturedInputs, CapturedStepState
from engine.kernels.compile_ahead import launchable
from engine.kernels.sampling_reference import NUM_SETTING_WORDS

_LANES = 512
_TOKEN_BLOCK = 256


@triton.jit
def _kv_slot(table_ptr, row, position, max_blocks, mask, BLOCK_SIZE: tl.constexpr):
    """Where the KV of `position` of the sequence in `row` lives."""
    block = tl.load(table_ptr + row * max_blocks + position // BLOCK_SIZE, mask=mask, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@launchable
@triton.jit(
    do_not_specialize=[
        "num_slots",
        "slot_words",
        "seqs_at",
        "groups_at",
        "max_groups",
        "ids_at",
        "updates_at",
        "settings_at",
        "max_seqs",
        "max_updates",
        "max_blocks",
        "num_places",
    ]
)
def _begin_kernel(
    params_ptr,
    launch_count_ptr,
    table_ptr,
    settings_ptr,
    last_ids_ptr,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    query_lens_ptr,
    query_start_ptr,
    block_rows_ptr,
    counts_ptr,
    sampling_rows_ptr,
    sampling_positions_ptr,
    logits_indices_ptr,
    members_ptr,
    member_start_ptr,
    group_lens_ptr,
    prefix_lens_ptr,
    num_slots,
    slot_words,
    seqs_at,
    groups_at,
    max_groups,
    ids_at,
    updates_at,
    settings_at,
    max_seqs,
    max_updates,
    max_blocks,
    num_places,
    NUM_SETTING_WORDS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    IS_PURE_DECODE: tl.constexpr,
    LANES: tl.constexpr,
):
    slot_ptr = params_ptr + (tl.load(launch_count_ptr) % num_slots) * slot_words
    num_seqs = tl.load(slot_ptr)
    num_decodes = tl.load(slot_ptr + 1)
    num_updates = tl.load(slot_ptr + 3)
    num_settings = tl.load(slot_ptr + 4)
    num_ids = tl.load(slot_ptr + 5)
    num_groups = tl.load(slot_ptr + 6)
    tl.store(counts_ptr, num_decodes)
    tl.store(counts_ptr + 1, num_seqs)

    lanes = tl.arange(0, LANES)
    for start in range(0, num_updates, LANES):
        entry = start + lanes
        is_entry = entry < num_updates
        index = tl.load(slot_ptr + updates_at + entry, mask=is_entry, other=0)
        block_id = tl.load(slot_ptr + updates_at + max_updates + entry, mask=is_entry, other=0)
        tl.store(table_ptr + index, block_id, mask=is_entry)
    for start in range(0, num_settings * NUM_SETTING_WORDS, LANES):
        entry = start + lanes
        is_entry = entry < num_settings * NUM_SETTING_WORDS
        row = tl.load(slot_ptr + settings_at + entry // NUM_SETTING_WORDS, mask=is_entry, other=0)
        word = tl.load(slot_ptr + settings_at + max_seqs + entry, mask=is_entry, other=0)
        place = row * NUM_SETTING_WORDS + entry % NUM_SETTING_WORDS
        tl.store(settings_ptr + place, word, mask=is_entry)
    # Groups that are not used have no tokens and no members.
    group_ptr = slot_ptr + groups_at
    group_len = tl.load(group_ptr + lanes, mask=lanes < num_groups, other=0)
    tl.store(group_lens_ptr + lanes, group_len, mask=lanes < max_groups)
    has_groups = num_groups > 0
    start_place = tl.where(has_groups, tl.minimum(lanes, num_groups), max_groups + 1)
    first_member = tl.load(
        group_ptr + max_groups + start_place, mask=start_place <= max_groups, other=0
    )
    tl.store(member_start_ptr + lanes, first_member, mask=lanes <= max_groups)
    # The sequences below read the table.
    tl.debug_barrier()

    total = num_seqs * 0
    for start in range(0, num_places, LANES):
        seqs = start + lanes
        is_place = seqs < num_places
        is_seq = seqs < num_seqs
        seq_ptrs = slot_ptr + seqs_at + seqs
        row = tl.load(seq_ptrs, mask=is_seq, other=max_seqs)
        query_len = tl.load(seq_ptrs + max_seqs, mask=is_seq, other=0)
        first = tl.load(seq_ptrs + 2 * max_seqs, mask=is_seq, other=0)
        samples = tl.load(seq_ptrs + 3 * max_seqs, mask=is_seq, other=0) != 0
        start_loc = total + tl.cumsum(query_len, axis=0) - query_len
        total += tl.sum(query_len, axis=0)
        tl.store(seq_lens_ptr + seqs, first + query_len, mask=is_place)
        tl.store(query_lens_ptr + seqs, query_len, mask=is_place)
        tl.store(query_start_ptr + seqs, start_loc, mask=is_place)
        tl.store(block_rows_ptr + seqs, row.to(tl.int64), mask=is_place)
        sampling_row = tl.where(samples, row, max_seqs).to(tl.int64)
        tl.store(sampling_rows_ptr + seqs, sampling_row, mask=is_place)
        tl.store(sampling_positions_ptr + seqs, (first + query_len).to(tl.int64), mask=is_place)
        last = tl.maximum(start_loc + query_len - 1, 0)
        tl.store(logits_indices_ptr + seqs, last.to(tl.int64), mask=is_place)
        is_member = is_seq & (seqs < tl.where(has_groups, num_places, 0))
        prefix_len = tl.load(seq_ptrs + 4 * max_seqs, mask=is_member, other=0)
        tl.store(prefix_lens_ptr + seqs, prefix_len, mask=is_place)
        member = tl.load(group_ptr + 2 * max_groups + 1 + seqs, mask=is_member, other=0)
        tl.store(members_ptr + seqs, member, mask=is_place)
        if IS_PURE_DECODE:
            host_id = tl.load(slot_ptr + ids_at + seqs, mask=seqs < num_ids, other=-1)
            host_id = host_id.to(tl.int64)
            device_id = tl.load(last_ids_ptr + row, mask=is_place, other=0)
            tl.store(
                input_ids_ptr + seqs, tl.where(host_id >= 0, host_id, device_id), mask=is_place
            )
            tl.store(positions_ptr + seqs, first.to(tl.int64), mask=is_place)
            slot = _kv_slot(table_ptr, row, first, max_blocks, is_seq, BLOCK_SIZE)
            tl.store(slots_ptr + seqs, tl.where(is_seq, slot, -1), mask=is_place)
    tl.store(query_start_ptr + num_places, total)


@launchable
@triton.jit(do_not_specialize=["num_slots", "slot_words", "ids_at", "max_blocks", "num_places"])
def _tokens_kernel(
    params_ptr,
    launch_count_ptr,
    table_ptr,
    last_ids_ptr,
    query_start_ptr,
    seq_lens_ptr,
    query_lens_ptr,
    block_rows_ptr,
    input_ids_ptr,
    positions_ptr,
    slots_ptr,
    num_slots,
    slot_words,
    ids_at,
    max_blocks,
    num_places,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    slot_ptr = params_ptr + (tl.load(launch_count_ptr) % num_slots) * slot_words
    num_seqs = tl.load(slot_ptr)
    num_decodes = tl.load(slot_ptr + 1)
    num_tokens = tl.load(slot_ptr + 2)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_place = tokens < num_places
    is_token = tokens < num_tokens
    # The last sequence that starts at or before the token; a decoding one is its own.
    low = tl.minimum(tokens, num_decodes)
    high = tl.zeros([BLOCK_T], tl.int32) + num_seqs
    while tl.max(high - low, axis=0) > 1:
        middle = (low + high) // 2
        start = tl.load(query_start_ptr + middle, mask=high - low > 1, other=0)
        is_left = start <= tokens
        is_open = high - low > 1
        high = tl.where(is_open & (start > tokens), middle, high)
        low = tl.where(is_open & is_left, middle, low)
    seq = tl.where(is_token, low, 0)
    row = tl.load(block_rows_ptr + seq, mask=is_token, other=0).to(tl.int32)
    start = tl.load(query_start_ptr + seq, mask=is_token, other=0)
    first = tl.load(seq_lens_ptr + seq, mask=is_token, other=0) - tl.load(
        query_lens_ptr + seq, mask=is_token, other=0
    )
    position = tl.where(is_token, first + tokens - start, 0)
    host_id = tl.load(slot_ptr + ids_at + tokens, mask=is_token, other=0).to(tl.int64)
    device_id = tl.load(last_ids_ptr + row, mask=is_token & (host_id < 0), other=0)
    tl.store(input_ids_ptr + tokens, tl.where(host_id >= 0, host_id, device_id), mask=is_place)
    tl.store(positions_ptr + tokens, position.to(tl.int64), mask=is_place)
    slot = _kv_slot(table_ptr, row, position, max_blocks, is_token, BLOCK_SIZE)
    tl.store(slots_ptr + tokens, tl.where(is_token, slot, -1), mask=is_place)


@launchable
@triton.jit(do_not_specialize=["num_slots", "max_seqs", "num_places"])
def _finish_kernel(
    token_ids_ptr,
    sampling_rows_ptr,
    last_ids_ptr,
    results_ptr,
    launch_count_ptr,
    num_slots,
    max_seqs,
    num_places,
    LANES: tl.constexpr,
):
    launch_count = tl.load(launch_count_ptr)
    tag = ((launch_count + 1) & 0x7FFFFFFF).to(tl.int64) << 32
    result_ptr = results_ptr + (launch_count % num_slots) * max_seqs
    for start in range(0, num_places, LANES):
        seqs = start + tl.arange(0, LANES)
        is_place = seqs < num_places
        token_id = tl.load(token_ids_ptr + seqs, mask=is_place, other=0)
        row = tl.load(sampling_rows_ptr + seqs, mask=is_place, other=max_seqs)
        # -1 (nothing could be sampled) must stay a valid input of steps launched ahead.
        is_kept = is_place & (row < max_seqs)
        tl.store(last_ids_ptr + row, tl.maximum(token_id, 0), mask=is_kept)
        tl.store(result_ptr + seqs, tag | (token_id & 0xFFFFFFFF), mask=is_place)
    # Every thread has read the old count.
    tl.debug_barrier()
    tl.store(launch_count_ptr, (launch_count + 1) & 0x7FFFFFFF)


def begin_captured_step(
    state: CapturedStepState, inputs: CapturedInputs, block_size: int, *, is_pure_decode: bool
) -> None:
    """Fill `inputs` from the slot of the launch that is about to run; update the tables.

    Args:
        state: The block table and the settings are changed in place.
        inputs: Written in place; T = B if `is_pure_decode`.
        block_size: Tokens per KV block.
        is_pure_decode: Every sequence runs one token, in the order of the rows.
    """
    layout = state.layout
    num_slots, max_blocks = state.params.shape[0], state.block_table.shape[1]
    num_seqs, num_tokens = inputs.seq_lens.shape[0], inputs.input_ids.shape[0]
    _begin_kernel[(1,)](
        state.params,
        state.launch_count,
        state.block_table,
        state.settings,
        state.last_token_ids,
        inputs.input_ids,
        inputs.positions,
        inputs.slot_mapping,
        inputs.seq_lens,
        inputs.query_lens,
        inputs.query_start_loc,
        inputs.block_rows,
        inputs.device_counts,
        inputs.sampling_rows,
        inputs.sampling_positions,
        inputs.logits_indices,
        inputs.shared_prefixes.members,
        inputs.shared_prefixes.member_start,
        inputs.shared_prefixes.group_lens,
        inputs.shared_prefixes.prefix_lens,
        num_slots,
        layout.size,
        layout.seqs,
        layout.groups,
        layout.max_groups,
        layout.ids,
        layout.updates,
        layout.settings,
        layout.max_seqs,
        layout.max_updates,
        max_blocks,
        num_seqs,
        NUM_SETTING_WORDS=NUM_SETTING_WORDS,
        BLOCK_SIZE=block_size,
        IS_PURE_DECODE=is_pure_decode,
        LANES=_LANES,
        num_warps=8,
    )
    if is_pure_decode:
        return
    _tokens_kernel[(triton.cdiv(num_tokens, _TOKEN_BLOCK),)](
        state.params,
        state.launch_count,
        state.block_table,
        state.last_token_ids,
        inputs.query_start_loc,
        inputs.seq_lens,
        inputs.query_lens,
        inputs.block_rows,
        inputs.input_ids,
        inputs.positions,
        inputs.slot_mapping,
        num_slots,
        layout.size,
        layout.ids,
        max_blocks,
        num_tokens,
        BLOCK_SIZE=block_size,
        BLOCK_T=_TOKEN_BLOCK,
        num_warps=4,
    )


def finish_captured_step(
    state: CapturedStepState, inputs: CapturedInputs, token_ids: torch.Tensor
) -> None:
    """Keep the sampled ids for the next step, hand them to the host and count the launch.

    Args:
        state: `last_token_ids`, `results` and `launch_count` are changed in place.
        inputs: Of this step.
        token_ids: [B] int64, -1 where nothing could be sampled.
    """
    num_seqs = token_ids.shape[0]
    _finish_kernel[(1,)](
        token_ids,
        inputs.sampling_rows,
        state.last_token_ids,
        state.results,
        state.launch_count,
        state.params.shape[0],
        state.layout.max_seqs,
        num_seqs,
        LANES=_LANES,
        num_warps=8,
    )
