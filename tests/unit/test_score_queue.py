import random

from gnuq_serve.score_options import ScoreOptions
from gnuq_serve.service.scorer.messages import ScoreRequest
from gnuq_serve.service.scorer.queue import ScoreQueue


def request(number, length, deadline=100.0):
    """An answer whose pass visits `length` positions."""
    return ScoreRequest(number, [1] * length, [2], deadline)


def filled(lengths, max_batch_tokens=100):
    queue = ScoreQueue(max_batch_tokens)
    for number, length in enumerate(lengths):
        queue.add("a", request(number, length))
    return queue


def numbers(batch):
    return [entry.request.id for entry in batch]


def test_similar_lengths_go_together_and_the_oldest_goes_first():
    queue = filled([10, 90, 11, 12, 88])
    assert numbers(queue.next_batch(0)) == [0, 2, 3]
    assert numbers(queue.next_batch(0)) == [1]
    assert numbers(queue.next_batch(0)) == [4]
    assert queue.next_batch(0) == []


def test_padding_counts():
    # 3 positions of 33 fit into 100; a fourth, padded to 33, does not
    assert len(filled([33, 1, 1, 1]).next_batch(0)) == 3


def test_too_long_for_a_batch_goes_alone():
    queue = filled([300, 5])
    assert numbers(queue.next_batch(0)) == [0]
    assert numbers(queue.next_batch(0)) == [1]


def test_only_what_is_scored_the_same_way_goes_together():
    queue = ScoreQueue(100)
    ways = [
        ScoreOptions(),
        ScoreOptions("answer_only"),
        ScoreOptions(),
        ScoreOptions(trace=True),
        ScoreOptions("answer_only"),
    ]
    for number, way in enumerate(ways):
        queue.add("a", ScoreRequest(number, [1] * 5, [2], 100.0, way))
    assert [numbers(queue.next_batch(0)) for _ in range(3)] == [[0, 2], [1, 4], [3]]


def test_late_answers_are_dropped():
    queue = ScoreQueue(100)
    queue.add("a", request(0, 5, deadline=1.0))
    queue.add("a", request(1, 5, deadline=3.0))
    assert numbers(queue.next_batch(1.0)) == [1]
    assert len(queue) == 0


def test_cancelled_answers_are_forgotten_of_their_sender_only():
    queue = ScoreQueue(100)
    for sender in ("a", "b"):
        queue.add(sender, request(7, 5))
    queue.cancel("a", 7)
    queue.cancel("a", 7)
    queue.cancel("c", 7)
    assert [entry.sender for entry in queue.next_batch(0)] == ["b"]


def test_whatever_comes_every_answer_is_given_out_once_and_batches_keep_their_size():
    rng = random.Random(5)
    for _ in range(50):
        lengths = [rng.randint(1, 120) for _ in range(rng.randint(1, 40))]
        queue = filled(lengths)
        seen = []
        while queue:
            oldest = min(set(range(len(lengths))) - set(seen))
            batch = queue.next_batch(0)
            assert oldest in numbers(batch)
            assert len(batch) == 1 or len(batch) * max(entry.length for entry in batch) <= 100
            seen += numbers(batch)
        assert sorted(seen) == list(range(len(lengths)))


def test_one_more_than_there_are_places_is_refused():
    queue = ScoreQueue(10, max_queue=3)
    assert [queue.add("ab"[n % 2], request(n, 10)) for n in range(4)] == [True, True, True, False]
    assert numbers(queue.next_batch(0)) == [0]
    assert not queue.add("a", request(4, 10))  # the batch in hand keeps its place
    queue.done()
    assert queue.add("a", request(4, 10))
    queue.cancel("b", 1)
    assert queue.add("a", request(5, 10))
    assert [numbers(queue.next_batch(0)) for _ in range(3)] == [[2], [4], [5]]


def test_or_waits_for_a_place():
    queue = ScoreQueue(100, max_queue=2, on_overload="wait")
    assert all(queue.add("a", request(number, 5)) for number in range(5))
    assert [numbers(queue.next_batch(0)) for _ in range(3)] == [[0, 1], [2, 3], [4]]
