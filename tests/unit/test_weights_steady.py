import pytest

from gnuq_serve.weights import steady
from gnuq_serve.weights.steady import ChangingWeightsError, SteadyPasses


class Weights:
    """A source whose version is what the test says at each look; the last one stays."""

    name = "shared"

    def __init__(self, *versions):
        self.versions = list(versions)

    def version(self):
        return self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]


class Passes(SteadyPasses):
    """Notes what is done: ``pass``, or ``forget``."""

    def __init__(self, *versions):
        self.done = []
        super().__init__(Weights(*versions), lambda: self.done.append("forget"))

    def one(self):
        self.done.append("pass")
        return len(self.done)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(steady, "_LOOK_SECONDS", 0.0)
    monkeypatch.setattr(steady, "_WAIT_SECONDS", 0.05)


def test_weights_that_stay():
    passes = Passes(4)
    assert passes.run(passes.one) == 2
    passes.run(passes.one)
    assert passes.done == ["forget", "pass", "pass"]


def test_changed_between_two_passes():
    passes = Passes(0, 0, 2)
    passes.run(passes.one)
    passes.run(passes.one)
    assert passes.done == ["forget", "pass", "forget", "pass"]


def test_changed_during_a_pass():
    """Nothing that the first try learned of the weights is kept, whatever it had read of them."""
    passes = Passes(0, None, None, 2, 2)
    assert passes.run(passes.one) == 4
    assert passes.done == ["forget", "pass", "forget", "pass"]


def test_changed_during_a_pass_and_back_to_steady_before_its_end():
    passes = Passes(0, 2)
    passes.run(passes.one)
    assert passes.done == ["forget", "pass"] * 2


def test_being_changed_before_a_pass():
    passes = Passes(None, None, 2)
    passes.run(passes.one)
    assert passes.done == ["forget", "pass"]


def test_changed_during_every_pass():
    passes = Passes(*range(0, 100, 2))
    with pytest.raises(ChangingWeightsError, match="changed during each of 3 passes"):
        passes.run(passes.one)
    assert passes.done.count("pass") == 3


def test_never_whole_again():
    passes = Passes(None)
    with pytest.raises(ChangingWeightsError, match="a change of them failed half-way"):
        passes.run(passes.one)
    assert passes.done == []
    passes._source.versions = [2]  # and then they are
    passes.run(passes.one)
    assert passes.done == ["forget", "pass"]
