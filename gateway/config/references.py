"""Names in the settings document: which names are taken, and what a reference means. Pure."""

from collections.abc import Iterable

from gateway.config.document import SettingsDocument
from gateway.config.problems import Path, Problems, expected_one_of

RESERVED = {"auto": "it lets the gateway choose the tier", "none": "metrics use it for requests without a tier"}


class References:
    """Lookup of backends and tiers by name, without regard to case; unknown names are problems."""

    def __init__(self, document: SettingsDocument, problems: Problems) -> None:
        self._document = document
        self._problems = problems
        self._backend_names = self._unique("backends", document.backends)

    def find_backend(self, name: str) -> str | None:
        """Return the backend with this name, None if there is none."""
        return self._backend_names.get(name.lower())

    def backend(self, path: Path, name: str) -> str | None:
        """Return the backend that `name` at `path` refers to, else report it and return None."""
        if found := self.find_backend(name):
            return found
        if name.lower() not in self._invalid("backends") and not self._problems.has_reported_whole(("backends",)):
            self._problems.add(path, f"{name!r} is not a backend; {expected_one_of(self._document.backends, name)}")
        return None

    def tier(self, path: Path, name: str) -> str:
        """Return the tier that `name` at `path` refers to, else report it and return ""."""
        tiers = {known.lower(): known for known in self._document.tiers}
        if (
            name.lower() not in tiers
            and name.lower() not in self._invalid("tiers")
            and not self._problems.has_reported_whole(("tiers",))
        ):
            self._problems.add(path, f"{name!r} is not a tier; {expected_one_of(self._document.tiers, name)}")
        return tiers.get(name.lower(), "")

    def check_public_names(self) -> None:
        """Report names of tiers, aliases, embedding models and rerankers that clients could not tell apart."""
        taken: dict[str, str] = {}
        for path, name in self._public_names():
            lower = name.lower()
            if lower in RESERVED and (lower == "auto" or (path[0] == "tiers" and len(path) == 2)):
                self._problems.add(path, f"{name!r} is reserved: {RESERVED[lower]}; expected another name")
            elif lower in taken:
                self._problems.add(
                    path, f"{name!r} is already used by {taken[lower]}; expected names that differ in more than case"
                )
            taken.setdefault(lower, ".".join(str(part) for part in path[:2]))

    def _public_names(self) -> Iterable[tuple[Path, str]]:
        for name in self._document.tiers:
            yield ("tiers", name), name
        for name, tier in self._document.tiers.items():
            for index, alias in enumerate(tier.aliases):
                yield ("tiers", name, "aliases", index), alias.name
        for name in self._document.embeddings:
            yield ("embeddings", name), name
        for name in self._document.rerankers:
            yield ("rerankers", name), name

    def _unique(self, section: str, names: Iterable[str]) -> dict[str, str]:
        """Return the names by their lower-case form; report those that differ only in case."""
        found: dict[str, str] = {}
        for name in names:
            if name.lower() in found:
                self._problems.add(
                    (section, name),
                    f"{name!r} and {found[name.lower()]!r} differ only in case; expected different names",
                )
            elif name.lower() in RESERVED:
                self._problems.add(
                    (section, name), f"{name!r} is reserved: {RESERVED[name.lower()]}; expected another name"
                )
            found.setdefault(name.lower(), name)
        return found

    def _invalid(self, section: str) -> set[str]:
        """Return the names, in lower case, of entries that were removed as invalid."""
        return {str(path[1]).lower() for path in self._problems.reported_below((section,))}
