"""LMAConfig: what is accepted, what is refused, and that it survives JSON."""

import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchrec_lma import LMAConfig

configs = st.builds(
    LMAConfig,
    compression=st.integers(1, 10**9) | st.floats(1, 1e12, allow_nan=False),
    chunk_dim=st.integers(1, 1024),
    seed=st.integers(0, 2**70),
) | st.builds(LMAConfig, memory_bytes=st.integers(1, 2**60), chunk_dim=st.integers(1, 1024), seed=st.integers(0, 2**70))


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
    assert LMAConfig(compression=16, chunk_dim=8, seed=3).to_dict() == {
        "compression": 16.0,
        "memory_bytes": None,
        "chunk_dim": 8,
        "seed": 3,
    }
    assert LMAConfig(memory_bytes=1 << 40).to_dict() == {
        "compression": None,
        "memory_bytes": 1 << 40,
        "chunk_dim": 4,
        "seed": 0,
    }


def test_from_dict_fills_in_defaults() -> None:
    assert LMAConfig.from_dict({"compression": 2}) == LMAConfig(compression=2)


def test_equal_settings_are_one_configuration() -> None:
    same = {LMAConfig(compression=16), LMAConfig(compression=16.0), LMAConfig(compression=16, chunk_dim=4, seed=0)}
    assert len(same) == 1
    assert LMAConfig(compression=16).to_dict() == LMAConfig(compression=16.0).to_dict()
    assert json.dumps(LMAConfig(compression=16).to_dict()) == json.dumps(LMAConfig(compression=16.0).to_dict())


def test_different_settings_are_different_configurations() -> None:
    configs = [
        LMAConfig(compression=16),
        LMAConfig(compression=17),
        LMAConfig(memory_bytes=16),
        LMAConfig(compression=16, chunk_dim=8),
        LMAConfig(compression=16, seed=1),
    ]
    assert len(set(configs)) == len(configs)


def test_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LMAConfig(compression=16).compression = 8  # type: ignore[misc]
    assert dataclasses.replace(LMAConfig(compression=16), seed=2) == LMAConfig(compression=16, seed=2)
    with pytest.raises(ValueError):
        dataclasses.replace(LMAConfig(compression=16), chunk_dim=0)


@pytest.mark.parametrize(
    "values, error, said",
    [
        ({}, ValueError, "exactly one of compression and memory_bytes"),
        (
            {"compression": 16, "memory_bytes": 1000},
            ValueError,
            "exactly one of compression and memory_bytes.*16.*1000",
        ),
        ({"compression": 0.5}, ValueError, "compression.*0.5"),
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
        ({"compression": 16, "chunk_dim": 0}, ValueError, "chunk_dim.*0"),
        ({"compression": 16, "chunk_dim": -4}, ValueError, "chunk_dim.*-4"),
        ({"compression": 16, "chunk_dim": 4.0}, TypeError, "chunk_dim.*4.0.*float"),
        ({"compression": 16, "seed": -1}, ValueError, "seed.*-1"),
        ({"compression": 16, "seed": None}, TypeError, "seed.*None"),
    ],
)
def test_bad_settings_are_refused_by_name(values: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        LMAConfig(**values)  # type: ignore[arg-type]
    with pytest.raises(error, match=said):
        LMAConfig.from_dict(values)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown.*\['chunks', 'rows'\].*chunk_dim"):
        LMAConfig.from_dict({"compression": 16, "rows": 5, "chunks": 2})
