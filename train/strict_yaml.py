"""YAML as this project reads and writes it: plain values, nothing guessed, nothing that builds objects or grows.

A SafeLoader less the rest of YAML: a key given twice is an error, so are tags (!x), anchors and aliases (&x, *x), keys
that are not text and nesting deeper than DEEPEST. `3e-4` is a number and `on`, `yes`, `012`, `1:30` are what they look like.
`dump` quotes what these rules would read as something else.
"""

from __future__ import annotations

import re

import yaml

from data.words import one_line, short

DEEPEST = 20  # mappings and lists inside one another; a config has four


def parse(text: str, where: str) -> object:
    """The value that `text` describes. ValueError, one sentence beginning with `where` and the line, where it is not readable."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ValueError(f"{where}{line}: not readable as YAML: {reason[:200]}") from None
    except RecursionError as error:  # only where the caller's own stack is nearly full
        raise ValueError(f"{where}: not readable as YAML: {one_line(error)}") from None


def dump(tree: object) -> str:
    """Text that `parse` reads back to an equal value; keys keep their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _refuse(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        if event.anchor is not None:  # of an alias too; a few lines of them can stand for gigabytes
            raise _refuse(
                f"anchors and aliases (& and *) are not taken ({short(event.anchor)}); write the value out, quote a text "
                "that begins with & or *, or use `base`",
                event.start_mark,
            )
        if event.tag is not None:
            raise _refuse(
                f"tags (!) are not taken ({short(event.tag)}); write a plain value, or quote a text that begins with !",
                event.start_mark,
            )
        self.depth += 1
        if self.depth > DEEPEST:
            raise _refuse(f"nested more than {DEEPEST} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    digits = loader.construct_scalar(node).replace("_", "")
    if len(digits) > 4000:  # Python itself stops at 4300
        raise _refuse(f"a number of {len(digits)} digits", node.start_mark)
    return int(digits)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _refuse(f"key {short(key)} is not text", key_node.start_mark)
        if key in seen:
            raise _refuse(f"key {short(key)} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=deep)


# YAML 1.2's core numbers and booleans in place of YAML 1.1's, which read 3e-4 as text, no as false and 012 as ten.
# Merge keys (<<) go too: `base` is how a file takes over another's keys.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the texts which _Loader would read as numbers, such as 3e-4."""

    yaml_implicit_resolvers = {
        first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) + _Loader.yaml_implicit_resolvers.get(first, [])
        for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | _Loader.yaml_implicit_resolvers.keys()
    }

    def ignore_aliases(self, data: object) -> bool:
        return True  # a list that stands in two places is written twice
