"""Access to a gateway: keys of clients, of operators and of scrapers, and the names of this machine."""

from gateway.api.admin_auth import AdminAccess
from gateway.api.auth import ApiKeys, KeylessPort
from gateway.api.hosts import HostCheck
from gateway.api.named_keys import open_accounts
from gateway.config import Settings
from gateway.keys.accounts import Accounts


class Access:
    """Access to a gateway, as its settings grant it.

    Attributes:
        accounts: those of the keys in `keys_file`; None if the settings name no such file.
        keys: keys of clients.
        hosts: check of the names that clients use for this machine.
        operator: access to `/ops`.
        scraper: access to `/metrics`.
    """

    def __init__(
        self,
        settings: Settings,
        accounts: Accounts | None = None,
        admin_token: str | None = None,
        *,
        is_local: bool,
        ollama_port: int | None = None,
    ) -> None:
        """Open the keys.

        `accounts` are those of `keys_file`, if it has been read before. `is_local` tells whether the gateway
        listens on loopback alone. `admin_token` and `ollama_port` are those of `Gateway`.

        Raises:
            ConfigError: `keys_file` cannot be used.
        """
        self.accounts = accounts or open_accounts(settings)
        self.keys = keys = ApiKeys((key.get_secret_value() for key in settings.api_keys), self.accounts)
        hosts = settings.host, *settings.allowed_hosts
        self.hosts = HostCheck(hosts, is_on=keys.is_open and is_local)
        if settings.ollama_as_key is not None and settings.ollama_port is not None:
            keys.keyless_port = KeylessPort(
                ollama_port or settings.ollama_port, settings.ollama_as_key, HostCheck(hosts, is_on=is_local)
            )
        admin = [settings.admin_key.get_secret_value()] if settings.admin_key else []
        scraper = [settings.metrics_key.get_secret_value()] if settings.metrics_key else []
        self.operator = AdminAccess(admin, admin_token, trusts_loopback=keys.is_open)
        self.scraper = AdminAccess([*admin, *scraper], admin_token, trusts_loopback=keys.is_open)
