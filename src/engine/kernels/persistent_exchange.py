"""How the programs of the persistent decode kernel hand each other small vectors, without barriers.

    word = epoch << 32 | 32 bits of data

Whoever computed a value stores it beside the number of its epoch, in one aligned word of eight
bytes; whoever needs it reads the word until the epoch is the one it waits for. The word that says
"ready" is the data: no fence, no counter, no second load (the LL protocol of NVIDIA's NCCL, within
one GPU). A barrier over the whole grid would cost the latency of a fence, an atomic and a poll
before the load of the data even starts.

Two values of 16 bits share the data of a word, half a vector apart in it, or half a head in qkv and
attention. All programs run at the same time (a cooperative launch), so that waiting ends.

Numerics: values move as they are. Loads are relaxed at the scope of the GPU and go past the
first-level cache. In Triton's interpreter, where programs run one after another, nobody can wait:
a word of another epoch yields NaN there.
"""

# Kernels annotate their compile-time parameters only; the rest are Triton values.
# mypy: disallow-incomplete-defs=False

from __future__ import annotations

import triton
import triton.language as tl


def _wait_assembly(num_words: int, epoch: int) -> str:
    """Load `num_words` words until all have the epoch, operand `epoch`; hand out their data."""
    address = num_words
    words = range(num_words)
    lines = [".reg .pred waits;", f".reg .b64 word<{num_words}>;", f".reg .b32 flag<{num_words}>;"]
    lines += ["AGAIN:"]
    lines += [f"ld.relaxed.gpu.global.b64 word{i}, [${address + i}];" for i in words]
    lines += [f"mov.b64 {{${i}, flag{i}}}, word{i};" for i in words]
    lines += [f"setp.ne.b32 waits, flag0, ${epoch};"]
    lines += [f"setp.ne.or.b32 waits, flag{i}, ${epoch}, waits;" for i in words[1:]]
    lines += ["@waits bra AGAIN;"]
    return "{\n" + "\n".join(lines) + "\n}"


def _wait_constraints(num_words: int) -> str:
    return ",".join(["=&r"] * num_words + ["l"] * num_words + ["r"] * num_words)


_WAIT_1 = tl.constexpr(_wait_assembly(1, 2))
_WAIT_2 = tl.constexpr(_wait_assembly(2, 4))
_WAIT_4 = tl.constexpr(_wait_assembly(4, 8))
_WAIT_8 = tl.constexpr(_wait_assembly(8, 16))
_WAIT_1_CONSTRAINTS = tl.constexpr(_wait_constraints(1))
_WAIT_2_CONSTRAINTS = tl.constexpr(_wait_constraints(2))
_WAIT_4_CONSTRAINTS = tl.constexpr(_wait_constraints(4))
_WAIT_8_CONSTRAINTS = tl.constexpr(_wait_constraints(8))


_WAIT_THREE = tl.constexpr(_wait_assembly(3, 6))
_WAIT_THREE_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,l,l,l,r")


@triton.jit
def _wait(word_ptrs, epoch, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, PACK: tl.constexpr):
    """Run the assembly, PACK words of a thread at once.

    Within a loop of one round (of which the compiler knows no number of rounds): it would run the
    assembly several times otherwise, once for each way in which the data is distributed over the
    threads later on, some of them with every thread waiting for everything.
    """
    data = tl.zeros(word_ptrs.shape, tl.int32)
    seen = epoch - 1
    while seen < epoch:
        data = tl.inline_asm_elementwise(
            ASSEMBLY, CONSTRAINTS, [word_ptrs, epoch], tl.int32, is_pure=False, pack=PACK
        )
        seen += 1
    return data


@triton.jit
def await_words(word_ptrs, epoch, THREADS: tl.constexpr):
    """The data of these words, int32, as soon as they are of this epoch.

    Args:
        word_ptrs: Any shape whose size is a power of two; every one is waited for.
        epoch: int32.
        THREADS: Of a program; 0 in the interpreter.
    """
    if THREADS == 0:
        words = tl.load(word_ptrs)
        data = (words & 0xFFFFFFFF).to(tl.int32)
        return tl.where((words >> 32).to(tl.int32) == epoch, data, -1)
    elif word_ptrs.numel >= 8 * THREADS:  # noqa: RET505 - compile-time branches
        return _wait(word_ptrs, epoch, _WAIT_8, _WAIT_8_CONSTRAINTS, 8)
    elif word_ptrs.numel >= 4 * THREADS:
        return _wait(word_ptrs, epoch, _WAIT_4, _WAIT_4_CONSTRAINTS, 4)
    elif word_ptrs.numel >= 2 * THREADS:
        return _wait(word_ptrs, epoch, _WAIT_2, _WAIT_2_CONSTRAINTS, 2)
    else:
        return _wait(word_ptrs, epoch, _WAIT_1, _WAIT_1_CONSTRAINTS, 1)


@triton.jit
def await_three(first_ptrs, second_ptrs, third_ptrs, epoch, THREADS: tl.constexpr):
    """Three times `await_words`, waiting once."""
    if THREADS == 0:
        first = await_words(first_ptrs, epoch, THREADS)
        second = await_words(second_ptrs, epoch, THREADS)
        third = await_words(third_ptrs, epoch, THREADS)
    else:
        first = tl.zeros(first_ptrs.shape, tl.int32)
        second, third = first, first
        seen = epoch - 1
        while seen < epoch:
            first, second, third = tl.inline_asm_elementwise(
                _WAIT_THREE,
                _WAIT_THREE_CONSTRAINTS,
                [first_ptrs, second_ptrs, third_ptrs, epoch],
                (tl.int32, tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
            seen += 1
    return first, second, third


@triton.jit
def await_vector(
    words_ptr, epoch, NUM_WORDS: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr
):
    """[BLOCK] int32: the data of NUM_WORDS words of a vector, then zeros."""
    index = tl.arange(0, BLOCK)
    is_word = index < NUM_WORDS
    data = await_words(words_ptr + tl.where(is_word, index, 0), epoch, THREADS)
    return tl.where(is_word, data, 0)


@triton.jit
def publish(words_ptr, places, data, epoch, mask):
    """Store 32 bits of data for those who wait for `epoch` at `places`."""
    word = (epoch.to(tl.int64) << 32) | (data.to(tl.int64) & 0xFFFFFFFF)
    tl.store(words_ptr + places, word, mask=mask)


@triton.jit
def pair(low, high):
    """Two values of 16 bits as the data of one word, int32."""
    low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return low | (high.to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit
def unpair(data, DTYPE: tl.constexpr):
    """(low, high) of `pair`."""
    low = (data & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (data >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return low, high
