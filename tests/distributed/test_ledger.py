"""The ledger keeps what processes do together, in order, with the lines it was done from."""

from simpo_pipeline.distributed.ledger import Event, Launch, Ledger, call_site, end_of_shortest, first_parting

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


def test_a_meeting_in_another_place_makes_another_page_but_no_other_launches():
    ledger, other = Ledger(), Ledger()
    ledger.record_meeting("gather", "steps.train:1")
    other.record_meeting("gather", "steps.train:2")
    assert ledger.page.digest() != other.page.digest()
    assert ledger.page.launch_digest() == other.page.launch_digest()


def test_a_turned_page_is_empty_and_numbered():
    ledger = Ledger()
    ledger.record(EVERYWHERE)
    before = ledger.page
    ledger.turn_page()
    assert (before.number, len(before.events)) == (0, 1)
    assert (ledger.page.number, ledger.page.events) == (1, [])


def test_an_event_says_from_which_line_it_was_launched():
    ledger = Ledger()
    ledger.record(EVERYWHERE)
    line = call_site()
    (event,) = ledger.page.events
    module, _, number = line.rpartition(":")
    assert str(event) == f"launched 'train_step' ({module}:{int(number) - 1})"


def event(name: str) -> Event:
    return Event(name, name)


def test_records_part_where_two_of_them_differ_first():
    a, b, c = event("a"), event("b"), event("c")
    assert first_parting([[a, b], [a], [a, c]]) == (1, [b, None, c])
    assert first_parting([[a, b], [a], []]) is None
    assert end_of_shortest([[a, b], [a]]) == (1, [b, None])
