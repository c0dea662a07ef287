"""python -m services.session_service.main: settings -> app -> run; nothing else."""

from services.session_service.app import create_app
from services.session_service.settings import SessionServiceSettings
from shared.database import from_settings
from shared.service import Lifecycle, read_settings, run
from shared.telemetry import configure_logging

NAME = "session_service"


def main() -> None:
    settings = read_settings(SessionServiceSettings, NAME)
    configure_logging(settings, NAME)
    lifecycle = Lifecycle()
    app = create_app(settings, from_settings(settings, NAME), lifecycle)
    run(
        app,
        name=NAME,
        host=settings.service_host,
        port=settings.service_port,
        settings=settings,
        lifecycle=lifecycle,
        register=True,
    )


if __name__ == "__main__":
    main()
