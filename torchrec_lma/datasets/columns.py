"""From columns as they are stored to ids, numbers, labels and times.

Serving must encode requests as training did: `encode_ids` and `encode_numeric` are the two functions to call.
"""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

STRING_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_string_view,
    pa.types.is_binary_view,
)
NUMBER_TYPES = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_null,
)
# Of numpy's units of time that Arrow has.
NANOSECONDS = {"D": 86_400 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def encode_ids(array: pa.Array) -> pa.Array:
    """The ids of one categorical column: `int64 [rows]`, null where missing, or `large_list<int64> [rows]` of bags.

    * integers and booleans are their own ids, negative ones included; uint64 keeps its 64 bits;
    * floats must hold integers (a nullable integer column that became float); NaN is missing;
    * strings and bytes are hashed to 64 bits by `pandas.util.hash_array` with its default key, the bits read as int64.
      The hash is the same on every machine and in every process; two of n strings collide with probability n^2 / 2^65.
      The empty string is a value like any other;
    * lists are bags of several ids, missing elements dropped; a missing list is an empty bag;
    * dictionary-encoded columns are what their values are.

    Raises:
        ValueError: the column has another type, or a float is not an integer of at most 2^53.
    """
    arrow_type = array.type
    if pa.types.is_integer(arrow_type):
        return array.view(pa.int64()) if pa.types.is_uint64(arrow_type) else array.cast(pa.int64())
    if pa.types.is_boolean(arrow_type) or pa.types.is_null(arrow_type):
        return array.cast(pa.int64())
    if pa.types.is_dictionary(arrow_type):
        return encode_ids(array.dictionary).take(array.indices)
    if pa.types.is_string_view(arrow_type) or pa.types.is_binary_view(arrow_type):
        return encode_ids(array.cast(pa.large_binary()))
    if any(is_type(arrow_type) for is_type in STRING_TYPES):
        encoded = array.dictionary_encode()  # hash each distinct string once
        strings = encoded.dictionary.to_numpy(zero_copy_only=False)  # [distinct] of str or bytes
        return pa.array(pd.util.hash_array(strings, categorize=False).view(np.int64)).take(encoded.indices)
    if pa.types.is_floating(arrow_type):
        values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)  # missing -> NaN
        missing = np.isnan(values)
        bad = values[~missing & ~((values == np.trunc(values)) & (np.abs(values) <= 2**53))]
        if bad.size:
            raise ValueError(f"float {bad[0]} is not an id: round or bin it to integers, or use the column as numeric")
        return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing)
    if _is_list(arrow_type):
        ids = encode_ids(array.flatten())  # skips the elements of missing lists
        if pa.types.is_large_list(ids.type):
            raise ValueError(f"{arrow_type} is a list of lists: flatten it to one list of ids a row")
        lengths = pc.list_value_length(array).fill_null(0).to_numpy()
        kept = np.repeat(np.arange(len(array)), lengths)[ids.is_valid().to_numpy(zero_copy_only=False)]
        offsets = np.zeros(len(array) + 1, np.int64)
        np.cumsum(np.bincount(kept, minlength=len(array)), out=offsets[1:])
        return pa.LargeListArray.from_arrays(pa.array(offsets), ids.drop_null())
    raise ValueError(f"type {arrow_type} cannot hold ids: convert the column to integers, strings, or a list of either")


def encode_numeric(array: pa.Array) -> pa.Array:
    """The values of one numeric column, `float32 [rows]`: sign(x) * log1p(|x|), and 0 where missing, NaN or infinite.

    Raises:
        ValueError: the column holds no numbers.
    """
    values = _as_float64(array)
    values[~np.isfinite(values)] = 0
    return pa.array((np.sign(values) * np.log1p(np.abs(values))).astype(np.float32))


def _as_float64(array: pa.Array) -> np.ndarray:
    """float64 [rows], NaN where missing."""
    array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
    arrow_type = array.type
    if not any(is_type(arrow_type) for is_type in NUMBER_TYPES):
        raise ValueError(f"type {arrow_type} holds no numbers: convert the column to integers or floats")
    return np.array(array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False))


def as_labels(array: pa.Array, rows: np.ndarray) -> pa.Array:
    """float32 [rows] of 0 and 1. `rows`: int64, the position in the file of each, for the error."""
    values = _as_float64(array)
    bad = np.flatnonzero((values != 0) & (values != 1))
    if bad.size:
        raise ValueError(
            f"row {rows[bad[0]]} (counting from 0) holds {array[bad[0]].as_py()!r}: a label is 0 or 1, "
            "clean or drop the row"
        )
    return pa.array(values.astype(np.float32))


def as_times(array: pa.Array) -> np.ndarray:
    """int64 or float64 [rows]; dates and timestamps in nanoseconds since 1970.

    Those before 1677 or after 2262, such as 9999-12-31 for "never", are as late as 64 bits can say: they keep their
    side of all others, and are at one time with each other.
    """
    if array.null_count:
        raise ValueError(f"{array.null_count} rows have no time to split by: drop or fill them")
    if id_type(array.type) == "strings":
        try:
            array = array.cast(pa.string()).cast(pa.timestamp("us"))
        except pa.ArrowInvalid as error:
            raise ValueError(f"strings give no order unless they are times in ISO 8601 ({error})") from error
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind == "M":
        nanoseconds = NANOSECONDS[np.datetime_data(values.dtype)[0]]
        most = np.iinfo(np.int64).max // nanoseconds
        return np.clip(values.view(np.int64), -most, most) * nanoseconds
    if values.dtype.kind not in "iuf" or np.isnan(values).any():
        raise ValueError(f"type {array.type} or a NaN in it gives no order: use numbers, dates or timestamps")
    return values


def id_type(arrow_type: pa.DataType) -> str | None:
    """What the values of a type are as ids: "integers" or "strings", which are other ids; None if there are none."""
    if pa.types.is_dictionary(arrow_type) or _is_list(arrow_type):
        return id_type(arrow_type.value_type)
    if pa.types.is_null(arrow_type):
        return None
    if pa.types.is_integer(arrow_type) or pa.types.is_floating(arrow_type) or pa.types.is_boolean(arrow_type):
        return "integers"
    return "strings" if any(is_type(arrow_type) for is_type in STRING_TYPES) else str(arrow_type)


def time_type(arrow_type: pa.DataType) -> str | None:
    """What the values of a type are as times: "numbers", or "times" of a calendar; None if there are none."""
    if pa.types.is_date(arrow_type) or pa.types.is_timestamp(arrow_type) or id_type(arrow_type) == "strings":
        return "times"
    return "numbers" if id_type(arrow_type) == "integers" else id_type(arrow_type)


def string_like_a_list(array: pa.Array) -> str | None:
    """A string that suggests a list, such as "a|b", where at least half of a column's distinct ones do."""
    if id_type(array.type) != "strings":
        return None
    values = array.flatten() if _is_list(array.type) else array
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    strings = [value for value in pc.unique(values).to_pylist()[:1000] if isinstance(value, str)]
    for pattern in (r".*[^|]\|[^|]", r".*[^;];[^;]", r".*[^,\s],[^,\s]", r"\[.*\]$"):
        found = [value for value in strings if re.match(pattern, value, re.DOTALL)]
        if found and 2 * len(found) >= len(strings):
            return found[0]
    return None


def as_bags(ids: pa.Array) -> pa.Array:
    """Ids that `encode_ids` made, in bags: `large_list<int64> [rows]`."""
    if not pa.types.is_int64(ids.type):
        return ids
    offsets = np.zeros(len(ids) + 1, np.int64)
    np.cumsum(ids.is_valid().to_numpy(zero_copy_only=False), out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), ids.drop_null())


def _is_list(arrow_type: pa.DataType) -> bool:
    return pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type)
