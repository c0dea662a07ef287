"""python -m services.relay.main: settings -> app -> run; nothing else."""

import sys

from services.relay.app import create_app
from services.relay.settings import RelaySettings
from shared.database import from_settings
from shared.service import Lifecycle, ServiceStopped, read_settings, run
from shared.telemetry import configure_logging

NAME = "relay"


def main() -> None:
    settings = read_settings(RelaySettings, NAME)
    configure_logging(settings, NAME)
    lifecycle = Lifecycle()
    try:
        app = create_app(settings, from_settings(settings, NAME), lifecycle)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{NAME} cannot start: {error}\n")
        raise ServiceStopped(1) from None
    run(
        app,
        name=NAME,
        host=settings.relay_host,
        port=settings.relay_port,
        settings=settings,
        lifecycle=lifecycle,
        register=False,
        websockets=True,
    )


if __name__ == "__main__":
    main()
