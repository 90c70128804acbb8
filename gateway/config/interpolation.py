"""`${NAME}` and `${NAME:-default}` in the text values of the YAML file. Pure."""

import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\$\$\{|\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?")
_COMMENT = re.compile(r"\s#")
_MAX_SHOWN_NAME = 80


class Interpolator:
    """Replaces the placeholders of a text by `variables`."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables

    def expand(self, text: str, *, is_free_text: bool = False) -> str:
        """Return `text` with its variables; `$${` stands for `${`, and a value is not expanded again.

        As in a shell, `${NAME:-default}` also replaces an empty variable. `is_free_text` accepts
        values with quotes around them and with ` #`.

        Raises:
            ValueError: a variable is not set, its value is probably a mistake, or the placeholder
                is malformed. The message names the variable and has no value.
        """

        def value(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name, default = match[1], match[2]
            if name is None:
                raise ValueError("expected ${NAME} or ${NAME:-default}; write $${ for the characters ${")
            found = self._variables.get(name)
            if default is not None and not found:
                return default
            if found is None:
                raise ValueError(
                    f"the variable {_shortened(name)} is not set; "
                    f"expected a value in the environment, or a default: ${{{_shortened(name)}:-default}}"
                )
            if not is_free_text and (mistake := leftover_syntax(found)):
                raise ValueError(f"the variable {_shortened(name)}: {mistake}")
            return found

        return _PLACEHOLDER.sub(value, text)


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_SHOWN_NAME else f"{name[:_MAX_SHOWN_NAME]}…"


def leftover_syntax(value: str) -> str | None:
    """Return what is wrong with a variable's value that has quotes around it or a comment in it.

    `docker run --env-file` and systemd's or Kubernetes' manifests take both for a part of the value.
    """
    text = value.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return "the value has quotes around it; remove them (docker's --env-file makes them a part of the value)"
    if _COMMENT.search(text):
        return "the value contains ' #'; put the comment on a line of its own (docker's --env-file keeps it)"
    return None
