"""The rests between rounds of news."""

from services.session_service.pacing import Pace

INTERVAL = 1.0


class Clock:
    """A pace and the time, which only passes where it is told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.pace = Pace(INTERVAL, self.now)

    def round(self, seconds: float, *, is_over: bool = False) -> float:
        """Makes a round that takes so long, and rests after it; gives how long the rest was."""
        self.now += seconds
        pause = self.pace.pause_seconds(self.now, is_over=is_over)
        self.now += pause
        return round(pause, 6)


def test_without_news_it_looks_once_in_an_interval() -> None:
    clock = Clock()
    assert [clock.round(0.25, is_over=True) for _ in range(3)] == [0.75, 0.75, 0.75]


def test_a_pass_is_spread_over_the_interval() -> None:
    clock = Clock()
    for is_over in (False, False, False, True):
        clock.round(0.125, is_over=is_over)
    began = clock.now
    rests = [clock.round(0.125, is_over=is_over) for is_over in (False, False, False, True)]
    assert rests == [0.125] * 4
    assert clock.now - began == INTERVAL


def test_a_pass_that_is_late_does_not_rest() -> None:
    clock = Clock()
    assert clock.round(0.25) == 0.75  # nobody knew that there was more
    assert [clock.round(0.25) for _ in range(9)] == [0.0] * 9
    assert clock.round(0.25, is_over=True) == 0.0
    # The next one, as long, has no time to rest either.
    assert [clock.round(0.25) for _ in range(10)] == [0.0] * 10


def test_what_was_much_is_little_again() -> None:
    clock = Clock()
    for _ in range(20):
        clock.round(0.25)
    clock.round(0.25, is_over=True)
    assert clock.round(0.25, is_over=True) == 0.75
