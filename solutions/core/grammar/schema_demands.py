"""What each keyword for one type of value demands, and what its opposite demands; see `schema_logic`.

Each function returns branches, or None where the keyword says nothing about this type.
"""

from __future__ import annotations

from typing import Any

from .claims import Branch, Reasoning
from .formats import EXACT, FORMATS
from .schema_document import IN_PLACE, Schema, child, refuse

Branches = tuple[Branch, ...]
ALWAYS: Branches = ((),)


def _range(name: str, keyword: str, value: Any, holds: bool, *more: Any) -> Branches:
    """At least, or at most, so many; `keyword` begins with min or max."""
    count = int(value)
    if keyword.startswith("min") == holds:
        low, high = count + (not holds), None
    else:
        low, high = 0, count - (not holds)
    if high is not None and high < 0:
        return ()
    return ALWAYS if (low, high) == (0, None) else (((name, low, high, *more),),)


def number_demands(schema: Schema, keyword: str, holds: bool, logic: Reasoning) -> Branches | None:
    value = schema.value[keyword]
    if keyword == "multipleOf":
        return ((("multiple", value, holds, schema.path),),)
    if keyword not in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") or isinstance(value, bool):
        return None
    strict = keyword.startswith("exclusive") or schema.value.get(f"exclusive{keyword.capitalize()}") is True
    above = keyword.lower().endswith("minimum")
    return ((("low" if above == holds else "high", value, strict == holds),),)


def string_demands(schema: Schema, keyword: str, holds: bool, logic: Reasoning) -> Branches | None:
    value = schema.value[keyword]
    if keyword in ("minLength", "maxLength"):
        return _range("length", keyword, value, holds)
    if keyword == "pattern":
        return ((("pattern", value, holds, schema.path),),)
    if keyword == "format" and value in FORMATS:
        if not holds and value not in EXACT:
            raise refuse(
                "format", schema.path, f"is not supported where {value} must not be met (not, if, or oneOf that overlaps)"
            )
        return ((("format", value, holds, schema.path),),)
    return None


def array_demands(schema: Schema, keyword: str, holds: bool, logic: Reasoning) -> Branches | None:
    value, here = schema.value, schema.value[keyword]
    if keyword in ("minItems", "maxItems"):
        return _range("size", keyword, here, holds)
    if keyword == "uniqueItems" and here:
        if not holds:
            raise refuse(keyword, schema.path, "is not supported where it must not be met")
        return ((("unique", schema.path),),)
    if keyword == "prefixItems" or (keyword == "items" and isinstance(here, list)):
        path = child(schema.path, keyword)
        claims = [logic.claim_of(one, child(path, i)) for i, one in enumerate(here)]
        if holds:
            return (tuple(("item", i, claim) for i, claim in enumerate(claims)),)
        return tuple((("size", i + 1, None), ("item", i, claim.against)) for i, claim in enumerate(claims))
    first = len(value["items"]) if isinstance(value.get("items"), list) else len(value.get("prefixItems", ()))
    if keyword == "unevaluatedItems":
        if (IN_PLACE | {"contains"}) & value.keys() and here is not True:
            raise refuse(keyword, schema.path, "is not supported beside keywords that look at the same items")
        if "items" in value and not isinstance(value["items"], list):
            return None
    if keyword in ("items", "unevaluatedItems") or (keyword == "additionalItems" and isinstance(value.get("items"), list)):
        claim = logic.inside(schema, keyword)
        if holds:
            return ((("items", first, claim),),)
        if claim.never:
            return ((("size", first + 1, None),),)
        if first and not claim.against.never:
            raise refuse(keyword, schema.path, "is not supported where it must not be met")
        return () if claim.against.never else ((("contains", claim.against, 1, None),),)
    if keyword == "contains":
        low, high = int(value.get("minContains", 1)), value.get("maxContains")
        claim = logic.inside(schema, keyword)
        if holds:
            return ((("contains", claim, low, None if high is None else int(high)),),)
        fewer = [(("contains", claim, 0, low - 1),)] if low else []
        return (*fewer, *([] if high is None else [(("contains", claim, int(high) + 1, None),)]))
    return None


def object_demands(schema: Schema, keyword: str, holds: bool, logic: Reasoning) -> Branches | None:
    value, here, path = schema.value, schema.value[keyword], schema.path
    if keyword in ("minProperties", "maxProperties"):
        return _range("count", keyword, here, holds, path)
    if keyword == "required":
        found = [("need", name) for name in here]
        return (tuple(found),) if holds else tuple((_without(name, logic),) for _, name in found)
    if keyword == "properties":
        claims = [(name, logic.inside(schema, keyword, name)) for name in here]
        if holds:
            return (tuple(("member", name, claim) for name, claim in claims),)
        return tuple((("need", name), ("member", name, claim.against)) for name, claim in claims if not claim.against.never)
    if keyword == "patternProperties":
        claims = [(name, logic.inside(schema, keyword, name)) for name in here]
        if holds:
            return (tuple(("like", name, claim, path) for name, claim in claims),)
        return tuple((("some", (), (), name, claim.against, path),) for name, claim in claims if not claim.against.never)
    if keyword == "unevaluatedProperties":
        if IN_PLACE & value.keys() and here is not True:
            raise refuse(
                keyword, path, "is not supported beside keywords that look at the same members; use additionalProperties"
            )
        if "additionalProperties" in value:
            return None
    if keyword in ("additionalProperties", "unevaluatedProperties"):
        names, patterns = tuple(value.get("properties", ())), tuple(value.get("patternProperties", ()))
        claim = logic.inside(schema, keyword)
        if holds:
            return ((("rest", names, patterns, claim, path),),)
        return () if claim.against.never else ((("some", names, patterns, None, claim.against, path),),)
    if keyword == "propertyNames":
        claim = logic.inside(schema, keyword)
        if not holds and not claim.against.never:
            raise refuse(keyword, path, "is not supported where it must not be met")
        return ((("names", claim, path),),) if holds else ()
    if keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        return _dependent(schema, keyword, holds, logic)
    return None


def _without(name: str, logic: Reasoning) -> tuple[Any, ...]:
    return ("member", name, logic.never)


def _dependent(schema: Schema, keyword: str, holds: bool, logic: Reasoning) -> Branches:
    """What a member brings with it, if it is there."""
    found: list[Branches] = []
    for name, follows in schema.value[keyword].items():
        if isinstance(follows, list):
            wanted: Branches = (tuple(("need", one) for one in follows),)
            missing: Branches = tuple((_without(one, logic),) for one in follows)
        else:
            claim = logic.inside(schema, keyword, name)
            wanted = missing = logic.claim(claim if holds else claim.against, "object")
        there: Branches = ((("need", name),),)
        if holds:
            found.append(logic.any_of([((_without(name, logic),),), logic.all_of([there, wanted])]))
        else:
            found.append(logic.all_of([there, missing]))
    return logic.all_of(found) if holds else logic.any_of(found)
