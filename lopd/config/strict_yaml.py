"""YAML read strictly: scalars stay text, and nothing is guessed, repeated or expanded.

The types of settings come from their fields (`lopd.config.values`), not from YAML's rules, by which
`010` is 8, `no` is false, `8e-5` is text and `2024-01-01` a date.
"""

from pathlib import Path
from typing import Any

from lopd.errors import ConfigError, MissingFileError

LARGEST = 1 << 16  # bytes; a recipe has a few thousand
_PLAIN = "tag:yaml.org,2002:"
_TAGS = {
    _PLAIN + name
    for name in ("null", "bool", "int", "float", "timestamp", "merge", "value", "str", "map", "seq")
}


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping, as `parse_yaml` reads it.

    Raises:
        MissingFileError: there is no such file.
        ConfigError: it is not such YAML, or larger than `LARGEST`.
    """
    try:
        with Path(path).open("rb") as file:  # which may be a pipe
            data = file.read(LARGEST + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise MissingFileError(f"{path}: no such file; expected YAML") from None
    if len(data) > LARGEST:
        raise ConfigError(f"{path}: found more than {LARGEST} bytes; expected at most that many")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML ({error})") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in a YAML text: its values are text, None, lists and mappings.

    Args:
        where: source of the text in error messages.

    Raises:
        ConfigError: not YAML, not a mapping, a key twice, an alias, or a tag such as `!!python`.

    >>> parse_yaml("seed: 010\\nlimit: null\\nstages: {eval: {}}", "recipe.yaml")
    {'seed': '010', 'limit': None, 'stages': {'eval': {}}}
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
                raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
            return super().compose_node(parent, index)

    def value_of(node: Any) -> Any:
        here = f"{where}, line {node.start_mark.line + 1}"
        if node.tag not in _TAGS:
            raise ConfigError(f"{here}: found the tag {node.tag}; expected none")
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{here}: found a list or mapping as a key; expected a name")
                if key.value in values:
                    line = key.start_mark.line + 1
                    raise ConfigError(f"{where}, line {line}: '{key.value}' is set twice")
                values[key.value] = value_of(value)
            return values
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item) for item in node.value]
        return None if node.tag == _PLAIN + "null" else node.value

    try:
        node = yaml.compose(text, Loader=Loader)
        values = {} if node is None else value_of(node)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply; expected a mapping of settings") from None
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"'{values}'"
        raise ConfigError(f"{where}: found {kind}; expected a mapping of settings")
    return values
