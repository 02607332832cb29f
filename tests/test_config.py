"""LMAConfig: what is accepted, what is refused, and that it survives JSON."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import DataType

from torchrec_lma import LMAConfig

some_widths = st.lists(st.integers(1, 64), min_size=1, max_size=6)
configs = st.builds(
    LMAConfig,
    compression=st.integers(1, 10**9) | st.floats(1, 1e12, allow_nan=False),
    widths=st.none() | some_widths | st.dictionaries(st.integers(1, 512), some_widths),
    data_type=st.sampled_from([None, "FP32", DataType.FP16, "BF16"]),
    skew=st.floats(0, 4) | st.integers(0, 4),
    seed=st.integers(0, 2**70),
    raw_ids=st.booleans() | st.lists(st.text(), max_size=3),
) | st.builds(LMAConfig, memory_bytes=st.integers(1, 2**60))


@settings(derandomize=True, deadline=None)
@given(configs)
def test_config_survives_a_dict_and_json(config: LMAConfig) -> None:
    for copy in (
        LMAConfig.from_dict(config.to_dict()),
        LMAConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        pickle.loads(pickle.dumps(config)),
    ):
        assert copy == config and hash(copy) == hash(config) and repr(copy) == repr(config)


def test_to_dict_has_every_field() -> None:
    config = LMAConfig(compression=16, widths={8: (4, 4)}, data_type="FP32", skew=1, seed=3, raw_ids=["t_user"])
    assert config.to_dict() == {
        "compression": 16.0,
        "memory_bytes": None,
        "widths": ((8, (4, 4)),),
        "data_type": "FP32",
        "skew": 1.0,
        "seed": 3,
        "raw_ids": ("t_user",),
    }
    assert LMAConfig(memory_bytes=1 << 40).to_dict() == {
        "compression": None,
        "memory_bytes": 1 << 40,
        "widths": None,
        "data_type": None,
        "skew": 0.0,
        "seed": 0,
        "raw_ids": False,
    }


def test_from_dict_fills_in_defaults() -> None:
    assert LMAConfig.from_dict({"compression": 2}) == LMAConfig(compression=2)


def test_equal_settings_are_one_configuration() -> None:
    given = [
        LMAConfig(compression=16, skew=1),
        LMAConfig(compression=16.0, skew=1.0, seed=0, raw_ids=()),
        LMAConfig(compression=16, skew=1, widths={}, raw_ids=False),
    ]
    assert len(set(given)) == 1
    assert len({json.dumps(config.to_dict()) for config in given}) == 1
    widths = [{8: [4, 4], 4: [4]}, ((4, (4,)), (8, (4, 4))), {4: (4,), 8: (4, 4)}]
    assert len({LMAConfig(compression=16, widths=one) for one in widths}) == 1  # type: ignore[arg-type]
    assert LMAConfig(compression=2, data_type=DataType.FP16) == LMAConfig(compression=2, data_type="FP16")  # type: ignore[arg-type]


def test_different_settings_are_different_configurations() -> None:
    configs = [
        LMAConfig(compression=16),
        LMAConfig(compression=17),
        LMAConfig(memory_bytes=16),
        LMAConfig(compression=16, widths=(4, 4)),
        LMAConfig(compression=16, widths={8: (4, 4)}),
        LMAConfig(compression=16, data_type="FP32"),
        LMAConfig(compression=16, skew=0.5),
        LMAConfig(compression=16, seed=1),
        LMAConfig(compression=16, raw_ids=True),
        LMAConfig(compression=16, raw_ids=("a",)),
    ]
    assert len(set(configs)) == len(configs)


def test_weights_are_of_half_precision_unless_said() -> None:
    assert LMAConfig(compression=16).weight_type is DataType.FP16
    assert LMAConfig(compression=16, data_type="FP32").weight_type is DataType.FP32


def test_widths_are_those_of_a_dim() -> None:
    one = LMAConfig(compression=16, widths=(2, 2, 4))
    assert one.widths_of(8) == (2, 2, 4)
    with pytest.raises(ValueError, match=r"\(2, 2, 4\) add up to 8 .*embedding_dim 16.*mapping"):
        one.widths_of(16)
    by_dim = LMAConfig(compression=16, widths={8: (8,), 16: (4, 12)})
    assert (by_dim.widths_of(8), by_dim.widths_of(16), by_dim.widths_of(32)) == ((8,), (4, 12), None)
    assert LMAConfig(compression=16).widths_of(8) is None


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LMAConfig(compression=16).compression = 8  # type: ignore[misc]
    assert dataclasses.replace(LMAConfig(compression=16), seed=2) == LMAConfig(compression=16, seed=2)
    with pytest.raises(ValueError, match="skew must be a finite number >= 0"):
        dataclasses.replace(LMAConfig(compression=16), skew=-1)


@pytest.mark.parametrize(
    "values, error, said",
    [
        ({}, ValueError, "exactly one of compression and memory_bytes"),
        (
            {"compression": 16, "memory_bytes": 1000},
            ValueError,
            "exactly one of compression and memory_bytes.*16.*1000",
        ),
        ({"compression": 0.5}, ValueError, "compression.*>= 1, got 0.5"),
        ({"compression": 0}, ValueError, "compression.*>= 1"),
        ({"compression": -16}, ValueError, "compression.*-16"),
        ({"compression": float("nan")}, ValueError, "compression.*nan"),
        ({"compression": float("inf")}, ValueError, "compression.*inf"),
        ({"compression": "16"}, TypeError, "compression.*'16'"),
        ({"compression": True}, TypeError, "compression.*True"),
        ({"memory_bytes": 0}, ValueError, "memory_bytes.*0"),
        ({"memory_bytes": -1}, ValueError, "memory_bytes.*-1"),
        ({"memory_bytes": 1e9}, TypeError, "memory_bytes.*float"),
        ({"memory_bytes": True}, TypeError, "memory_bytes.*bool"),
        ({"memory_bytes": "1GB"}, TypeError, "memory_bytes.*'1GB'"),
        ({"compression": 16, "widths": (4, 0)}, ValueError, "width.*0"),
        ({"compression": 16, "widths": (4, -4)}, ValueError, "width.*-4"),
        ({"compression": 16, "widths": (4.0,)}, TypeError, "width.*4.0.*float"),
        ({"compression": 16, "widths": 4}, TypeError, "widths.*sequence.*4"),
        ({"compression": 16, "widths": ()}, TypeError, "widths.*sequence"),
        ({"compression": 16, "widths": "44"}, TypeError, "widths.*'44'"),
        ({"compression": 16, "widths": {8: ()}}, TypeError, "widths.*sequence"),
        ({"compression": 16, "widths": {"8": (8,)}}, TypeError, "dim of widths.*'8'"),
        ({"compression": 16, "widths": {8: 8}}, TypeError, "widths.*8"),
        ({"compression": 16, "widths": [4, [4]]}, TypeError, "width"),
        ({"compression": 16, "data_type": "INT8"}, ValueError, "data_type 'INT8'.*FP32, FP16, BF16.*quantize"),
        ({"compression": 16, "data_type": 16}, ValueError, "data_type 16"),
        ({"compression": 16, "skew": -0.5}, ValueError, "skew.*-0.5"),
        ({"compression": 16, "skew": 5}, ValueError, "skew.*<= 4, got 5"),
        ({"compression": 16, "skew": float("nan")}, ValueError, "skew.*nan"),
        ({"compression": 16, "skew": None}, TypeError, "skew.*None"),
        ({"compression": 16, "seed": -1}, ValueError, "seed.*-1"),
        ({"compression": 16, "seed": None}, TypeError, "seed.*None"),
        ({"compression": 16, "raw_ids": "t_user"}, TypeError, "raw_ids.*'t_user'"),
        ({"compression": 16, "raw_ids": [1]}, TypeError, "raw_ids.*1"),
        ({"compression": 16, "raw_ids": None}, TypeError, "raw_ids.*None"),
    ],
)
def test_bad_settings_are_refused_by_name(values: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        LMAConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(error, match=said):
        LMAConfig.from_dict(values)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown.*\['chunk_dim', 'rows'\].*widths"):
        LMAConfig.from_dict({"compression": 16, "rows": 5, "chunk_dim": 4})
