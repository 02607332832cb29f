"""The integer arithmetic under every row, against the same arithmetic on Python's unbounded integers."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.integer_reference import MASK, reference_mix64, reference_to_row, reference_unmix64, signed
from torchrec_lma.hashing import level_multiplier, mix64, salt, table_salt, to_row, unmix64

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
EXTREMES = [0, 1, -1, 2, -2, 2**31 - 1, 2**31, -(2**31), 2**32, 2**63 - 2, INT64_MAX, INT64_MIN, INT64_MIN + 1]
int64s = st.integers(INT64_MIN, INT64_MAX) | st.sampled_from(EXTREMES)

holds_for_every_input = settings(derandomize=True, deadline=None, max_examples=200)


@holds_for_every_input
@given(st.lists(int64s, min_size=1, max_size=20))
def test_mix64_is_splitmix64_for_every_int64(values: list[int]) -> None:
    assert mix64(torch.tensor(values)).tolist() == [reference_mix64(x) for x in values]


def test_mix64_gives_the_published_numbers_of_splitmix64() -> None:
    # The generator adds the golden gamma to its seed and finalizes: these are its first outputs for seed 1234567.
    state = [signed(1234567 + k * 0x9E3779B97F4A7C15) for k in range(1, 6)]
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [x & MASK for x in mix64(torch.tensor(state)).tolist()] == published


@holds_for_every_input
@given(int64s)
def test_mix64_loses_no_information(x: int) -> None:
    assert reference_unmix64(int(mix64(torch.tensor(x)))) == x
    assert unmix64(torch.tensor(reference_mix64(x))).item() == x


def test_mix64_maps_a_million_close_ids_to_different_keys() -> None:
    ids = torch.cat([torch.arange(-250_000, 250_000), torch.arange(1, 500_001) << 40])
    assert mix64(ids).unique().numel() == ids.numel()


def test_every_input_bit_of_mix64_flips_every_output_bit_half_of_the_time() -> None:
    ids = torch.arange(4000)
    for bit in range(64):
        flipped = mix64(ids) ^ mix64(ids ^ signed(1 << bit))
        share = torch.stack([(flipped >> out) & 1 for out in range(64)]).double().mean(dim=1)
        assert (share - 0.5).abs().max() < 5 * 0.5 / 4000**0.5


def test_mix64_keeps_shapes_and_takes_no_ids() -> None:
    assert mix64(torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3)
    assert mix64(torch.empty(0, dtype=torch.int64)).shape == (0,)


@holds_for_every_input
@given(
    st.lists(int64s, min_size=1, max_size=8),
    int64s.map(lambda x: x | 1),
    st.integers(1, 2**31 - 1) | st.sampled_from([1, 2, 3, 2**16, 2**30, 2**31 - 1]),
)
def test_to_row_is_multiply_fold_and_remainder(values: list[int], multiplier: int, rows: int) -> None:
    result = to_row(torch.tensor(values), multiplier, rows)
    assert result.tolist() == [reference_to_row(x, multiplier, rows) for x in values]
    assert int(result.min()) >= 0 and int(result.max()) < rows


@pytest.mark.parametrize("trailing_zeros", [8, 20, 32])
def test_keys_that_agree_in_their_low_bits_part_on_the_other_levels(trailing_zeros: int) -> None:
    # What the fold is for: a product with an odd number keeps agreement in low bits on every level.
    rows, n = 256, 20_000
    a = mix64(torch.arange(n))
    b = a + (torch.randint(1, 2**20, (n,), generator=torch.Generator().manual_seed(2)) << trailing_zeros)
    multipliers = [level_multiplier(0, level) for level in range(8)]
    equal = torch.stack([to_row(a, m, rows) == to_row(b, m, rows) for m in multipliers])
    expected = 1 / rows
    assert abs(equal.double().mean() - expected) < 6 * (expected / equal.numel()) ** 0.5


@pytest.mark.parametrize(
    "constant, pinned",
    [
        (salt("signature", 0), 1628369928481471983),
        (salt("minhash", 0, 1, 2), -5061035593744744478),
        (table_salt(0, "t_user"), 3999495583570417351),
        (table_salt(1, "t_user"), -1303307524075815441),
        (level_multiplier(0, 0), -6826908350692168397),
        (level_multiplier(0, 3), -4570787690391254151),
        (level_multiplier(7, 0), 6175883800779536429),
    ],
)
def test_constants_never_change(constant: int, pinned: int) -> None:
    """Every saved checkpoint depends on them: if this fails, old weights are read at the wrong rows."""
    assert constant == pinned


@holds_for_every_input
@given(st.lists(st.text() | st.integers(), min_size=1, max_size=4))
def test_salt_is_the_first_eight_bytes_of_sha256(parts: list[object]) -> None:
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode("utf-8")).digest()
    assert salt(*parts) == int.from_bytes(digest[:8], "little", signed=True)


def test_table_salts_differ_between_tables_and_seeds() -> None:
    salts = {table_salt(seed, f"t{i}") for seed in range(20) for i in range(20)}
    assert len(salts) == 400


@holds_for_every_input
@given(st.integers(0, 2**40))
def test_level_multipliers_are_odd_and_differ(seed: int) -> None:
    multipliers = [level_multiplier(seed, level) for level in range(20)]
    assert all(m % 2 == 1 and INT64_MIN <= m <= INT64_MAX for m in multipliers)
    assert len(set(multipliers)) == 20
