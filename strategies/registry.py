"""The strategies that exist: the two built-in ones and those that other packages add, all through one door."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points

from strategies.base import Strategy
from strategies.errors import ConfigError

ENTRY_POINT_GROUP = "parallel_tune.strategies"
_MEMBERS = ("name", "auto_order", "assess", "plan", "open")


class StrategyRegistry:
    """Strategies by name.

    An entry point that cannot be loaded is kept by name with its error: whoever asks for it gets the error, whoever
    asks for another is not disturbed, and `warnings()` has a line about it.
    """

    def __init__(self) -> None:
        self._strategies: dict[str, Strategy] = {}
        self._broken: dict[str, str] = {}

    def register(self, strategy: Strategy) -> None:
        """Add a strategy.

        Raises:
            ConfigError: it is no strategy, or its name is taken or not usable on a command line.
        """
        missing = [member for member in _MEMBERS if not hasattr(strategy, member)]
        if missing:
            raise ConfigError(
                f"{strategy!r} is no strategy: it lacks {', '.join(missing)}.",
                "See the Strategy protocol in strategies/base.py.",
            )
        name = strategy.name
        if name == "auto" or not name.isidentifier():
            raise ConfigError(
                f"a strategy cannot be called {name!r}.", "Use letters, digits and underscores; `auto` is taken."
            )
        if name in self._strategies:
            raise ConfigError(
                f"two strategies are called {name!r}: {_origin(self._strategies[name])} and {_origin(strategy)}.",
                f"Rename or uninstall one. Registered: {', '.join(self.names())}.",
            )
        self._strategies[name] = strategy

    def get(self, name: str) -> Strategy:
        """The strategy of that name.

        Raises:
            ConfigError: there is none, or its package is broken.
        """
        if name in self._strategies:
            return self._strategies[name]
        if name in self._broken:
            raise ConfigError(
                f"strategy {name!r} could not be loaded: {self._broken[name]}",
                f"Repair or uninstall its package. These work: {', '.join(self.names()) or 'none'}.",
            )
        if not self._strategies:
            raise ConfigError(
                f"no strategy {name!r}: none is registered.",
                "parallel-tune is not installed completely: run `pip install -e .` in its checkout.",
            )
        near = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no strategy {name!r}.", f"{hint}Registered: {', '.join(self.names())}.")

    def names(self) -> tuple[str, ...]:
        """Names in alphabetical order."""
        return tuple(sorted(self._strategies))

    def in_auto_order(self) -> tuple[Strategy, ...]:
        """Strategies in the order in which `auto` asks them."""
        return tuple(sorted(self._strategies.values(), key=lambda s: (s.auto_order, s.name)))

    def mark_broken(self, name: str, error: str) -> None:
        """Remember that the strategy of that name could not be loaded, and why."""
        self._broken[name] = error

    def warnings(self) -> tuple[str, ...]:
        """A line for each strategy that could not be loaded, for the caller to print."""
        return tuple(f"warning: strategy {name!r} is left out: {error}" for name, error in sorted(self._broken.items()))


def load_registry(points: Iterable[EntryPoint] | None = None) -> StrategyRegistry:
    """A registry filled from the installed entry points (or those given); an entry is a class or an instance.

    Raises:
        ConfigError: two packages claim one name: what `--strategy` means must never depend on the search path.
    """
    registry = StrategyRegistry()
    seen: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP) if points is None else points:
        if point.name in seen:
            if seen[point.name] == point.value:
                continue  # one package, found twice on the path
            raise ConfigError(
                f"two packages offer a strategy {point.name!r}: {seen[point.name]} and {point.value}.",
                "Uninstall one of them.",
            )
        seen[point.name] = point.value
        _load_into(registry, point)
    return registry


def _load_into(registry: StrategyRegistry, point: EntryPoint) -> None:
    try:
        loaded = point.load()
        strategy = loaded() if isinstance(loaded, type) else loaded
        named = getattr(strategy, "name", point.name)
        if named != point.name:
            raise ConfigError(f"it calls itself {named!r}.", "Give entry point and strategy one name.")
        registry.register(strategy)
    except Exception as error:  # another package's code: whatever it raises must not stop the others
        what = error.message if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        registry.mark_broken(point.name, f"{point.value}: {what}")


def _origin(strategy: Strategy) -> str:
    return f"{type(strategy).__module__}.{type(strategy).__qualname__}"
