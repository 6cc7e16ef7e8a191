"""The users of a simulation: opened one by one, encoded for the trainer, and forgotten again.

A built-in world is generated as it is asked for; users from a file are read once. Users are numbered, and the number
is all that the wire, the ledger and the report see of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from client.user_data import Encoder, Split, User, split
from client.vault import EncodedUser, encode_user
from common.config import BUILT_IN, RunConfig
from common.errors import ConfigError, DataError
from simulations.planning import DEFAULT_USERS
from simulations.worlds.built_in import WORLD_VERSION, built_in_user, population
from simulations.worlds.loaders import load_users

__all__ = ["Population", "open_population", "outsiders"]

CACHED_USERS = 4_000


class Population:
    """The users of one run, by number.

    Attributes:
        digest: Names the data set, hex: budgets are registered under it.
        encoder: Turns records into tokens.
    """

    def __init__(self, users: Sequence[User], encoder: Encoder, digest: str, *, by_record: bool = False) -> None:
        """Number `users` in their order; `by_record` splits as unit example needs, see `split`."""
        self._users = users
        self.encoder = encoder
        self.digest = digest
        self._by_record = by_record
        self._cache: OrderedDict[str, EncodedUser] = OrderedDict()

    def __len__(self) -> int:
        """How many users there are."""
        return len(self._users)

    def user(self, name: str) -> User:
        """Open one user by number."""
        return self._users[int(name)]

    def number_of(self, identifier: str) -> str:
        """Find a user by the id that the data gives, or by number.

        Raises:
            DataError: There is no such user.
        """
        if isinstance(self._users, list):  # people of a file have names of their own, and a name may be a number
            for number, user in enumerate(self._users):
                if user.id == identifier:
                    return str(number)
        if identifier.isdigit() and int(identifier) < len(self._users):
            return identifier
        raise DataError(f"no such user among the {len(self._users)} of this run")

    def split(self, name: str) -> Split:
        """Cut one user's records into the parts that `encoded` has."""
        return split(self.user(name), by_record=self._by_record)

    def encoded(self, name: str) -> EncodedUser:
        """Encode one user's records; a user with too few has empty parts and is not scored."""
        known = self._cache.get(name)
        if known is not None:
            self._cache.move_to_end(name)
            return known
        encoded = encode_user(self.user(name), self.encoder, by_record=self._by_record)
        self._cache[name] = encoded
        if len(self._cache) > CACHED_USERS:
            self._cache.popitem(last=False)
        return encoded

    def sample(self, count: int, seed: int) -> list[str]:
        """Take up to `count` users who can be scored, at random by seed, in increasing order."""
        order = np.random.default_rng([seed, 0xE7A1]).permutation(len(self._users))
        chosen: list[str] = []
        for number in order:
            if len(chosen) == count:
                break
            own = self.encoded(str(number))
            if own.train and own.validation and own.test:
                chosen.append(str(number))
        return sorted(chosen, key=int)


def open_population(config: RunConfig, encoder: Encoder) -> Population:
    """Open the users that a configuration names.

    Raises:
        ConfigError: More users are asked for than the data has.
        DataError: The data cannot be read.
    """
    by_record = config.unit == "example"
    if config.data == BUILT_IN:
        count = config.users or DEFAULT_USERS
        return Population(population(config.seed, count), encoder, _digest(config, count), by_record=by_record)
    source = load_users(
        config.data, user_column=config.user_column, text_column=config.text_column, time_column=config.time_column
    )
    users = list(source)
    if config.users is not None:
        if config.users > len(users):
            raise ConfigError(f"users: {config.users} were asked for, {config.data} has {len(users)}")
        users = [users[index] for index in _picked(config, len(users))]
    return Population(users, encoder, source.source_digest, by_record=by_record)


def outsiders(config: RunConfig) -> Iterator[User]:
    """People of the same data who are not enrolled: endless in the built-in world, who was not picked in a file."""
    if config.data == BUILT_IN:
        count = config.users or DEFAULT_USERS
        yield from (built_in_user(config.seed, number) for number in itertools.count(count))
        return
    source = load_users(
        config.data, user_column=config.user_column, text_column=config.text_column, time_column=config.time_column
    )
    users = list(source)
    picked = set(_picked(config, len(users)).tolist())
    yield from (user for number, user in enumerate(users) if number not in picked)


def _picked(config: RunConfig, count: int) -> NDArray[np.intp]:
    """Which of the `count` users of a file are enrolled, in order."""
    if config.users is None:
        return np.arange(count)
    return np.sort(np.random.default_rng([config.seed, 0x05E5]).permutation(count)[: config.users])


def _digest(config: RunConfig, count: int) -> str:
    name = f"built-in world {WORLD_VERSION}, seed {config.seed}, {count} users"
    return hashlib.sha256(name.encode()).hexdigest()
