"""The JSON Schema and the reference pages say what the loader does."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from soup_xb.core.config.load import config_dict, parse_config
from soup_xb.core.config.pages import DIALECT, config_page, config_schema
from soup_xb.core.config.schema import KEYS, Config, DataConfig
from soup_xb.core.config.yaml import write_yaml
from soup_xb.core.errors import ConfigError

TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
}


def is_type(value: Any, name: str) -> bool:
    if name == "null" or value is None:
        return name == "null" and value is None
    return isinstance(value, TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value fits, for the keywords that our schema uses; any other keyword fails the test."""
    known = {
        "$schema",
        "title",
        "description",
        "default",
        "type",
        "enum",
        "anyOf",
        "properties",
        "required",
        "items",
    }
    known |= {"additionalProperties", "propertyNames", "maxProperties", "minItems", "minLength", "maxLength"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    assert set(schema) <= known, set(schema) - known
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and not any(is_type(value, name) for name in names):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(fits(value, option) for option in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        return fits_mapping(value, schema)
    if isinstance(value, list):
        items = all(fits(entry, schema.get("items", {})) for entry in value)
        return items and len(value) >= schema.get("minItems", 0)
    if isinstance(value, str):
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**9)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and ("exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"])
            and ("exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"])
        )
    return True


def fits_mapping(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    if not set(schema.get("required", ())) <= set(value) or len(value) > schema.get("maxProperties", 10**9):
        return False
    for name, entry in value.items():
        if name not in properties and others is False:
            return False
        if not fits(entry, properties.get(name, others)) or not fits(name, schema.get("propertyNames", {})):
            return False
    return True


def least(**changes: Any) -> dict[str, Any]:
    return {"base": "tiny", "data": {"train": "rows.jsonl"}, **changes}


def test_the_schema_is_json_of_the_2020_12_dialect() -> None:
    schema = config_schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["$schema"] == DIALECT == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_stands_in_the_schema_with_meaning_and_default() -> None:
    for dotted, key in KEYS.items():
        schema = config_schema()
        for name in dotted.split("."):
            assert schema["additionalProperties"] is False
            schema = schema["properties"][name]
        assert schema["description"] == key.meaning
        assert ("default" in schema) == (key.section is None and not key.required)
        assert "default" not in schema or fits(schema["default"], schema) or schema["default"] == []


def test_a_resolved_config_fits_the_schema() -> None:
    assert fits(config_dict(Config(base="tiny", data=DataConfig(train="rows.jsonl"))), config_schema())


@pytest.mark.parametrize(
    ("values", "good"),
    [
        (least(), True),
        (least(training={"lora": {"rank_pattern": {"q_proj": 8}, "target_modules": ["q_proj"]}}), True),
        (least(training={"max_steps": None, "lr": 1}), True),
        (least(data={"train": ["a", "b"], "eval": "c"}), True),
        ({"data": {"train": "x"}}, False),
        (least(data={}), False),
        (least(data={"train": []}), False),
        (least(base=""), False),
        (least(nothing=1), False),
        (least(training={"lr": 0}), False),
        (least(training={"lr": True}), False),
        (least(training={"epochs": 1.5}), False),
        (least(training={"lora": {"r": 1025}}), False),
        (least(training={"lora": {"dropout": 1.0}}), False),
        (least(training={"lora": {"rank_pattern": {"q_proj": 0}}}), False),
        (least(training={"lora": {"rank_pattern": {"": 8}}}), False),
        (least(training={"lora": {"rank_pattern": {f"m{index}": 8 for index in range(257)}}}), False),
        (least(training={"lora": {"init_strategy": "pizza"}}), False),
        (least(training={"relora_steps": 5, "relora_prune_ratio": 1.0}), False),
    ],
)
def test_schema_and_loader_agree(values: dict[str, Any], good: bool) -> None:
    assert fits(values, config_schema()) == good
    if good:
        parse_config(write_yaml(values), "soup.yaml")
        return
    with pytest.raises(ConfigError):
        parse_config(write_yaml(values), "soup.yaml")


def test_the_reference_page_has_every_key_once() -> None:
    keys = re.findall(r"^\| `(\w+)` \|", config_page(), re.MULTILINE)
    assert sorted(keys) == sorted(key.rpartition(".")[2] for key in KEYS)
