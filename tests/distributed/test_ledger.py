"""The ledger records shared actions of the processes in order, with the lines that called them."""

from simpo_pipeline.distributed.ledger import Event, Launch, Ledger, call_site, end_of_shortest, first_divergence

EVERYWHERE = Launch("train_step", "f0", 8, 4)
HERE = Launch("decode", "f1", 2, 1)


def test_launches_on_one_process_are_counted_and_not_compared():
    ledger, other = Ledger(), Ledger()
    for launch in (EVERYWHERE, HERE, HERE, EVERYWHERE):
        ledger.record(launch)
    for launch in (EVERYWHERE, EVERYWHERE):
        other.record(launch)
    assert ledger.launches == (EVERYWHERE, HERE, HERE, EVERYWHERE)
    assert ledger.multi_process_launches == (EVERYWHERE, EVERYWHERE)
    assert ledger.digest() == other.digest()
    assert ledger.page.digest() == other.page.digest()


def test_a_meeting_at_another_line_changes_the_page_digest_but_not_the_launch_digest():
    ledger, other = Ledger(), Ledger()
    ledger.record_meeting("gather", "steps.train:1")
    other.record_meeting("gather", "steps.train:2")
    assert ledger.page.digest() != other.page.digest()
    assert ledger.page.launch_digest() == other.page.launch_digest()


def test_turning_the_page_starts_an_empty_page_with_the_next_number():
    ledger = Ledger()
    ledger.record(EVERYWHERE)
    before = ledger.page
    ledger.turn_page()
    assert (before.number, len(before.events)) == (0, 1)
    assert (ledger.page.number, ledger.page.events) == (1, [])


def test_an_event_names_the_line_that_launched_it():
    ledger = Ledger()
    ledger.record(EVERYWHERE)
    line = call_site()
    (event,) = ledger.page.events
    module, _, number = line.rpartition(":")
    assert str(event) == f"launched 'train_step' ({module}:{int(number) - 1})"


def event(name: str) -> Event:
    return Event(name, name)


def test_records_diverge_at_the_first_difference_between_two_of_them():
    a, b, c = event("a"), event("b"), event("c")
    assert first_divergence([[a, b], [a], [a, c]]) == (1, [b, None, c])
    assert first_divergence([[a, b], [a], []]) is None
    assert end_of_shortest([[a, b], [a]]) == (1, [b, None])
