"""Awareness: a client sets only its own state, and is visible again at once after a reconnect."""

from uuid import uuid4

import pytest

from server.documents.awareness import GONE, MOST_CLIENTS, RENEW_SECONDS, STALE_SECONDS, Awareness
from server.documents.wire import Entry, Malformed

ALICE, BOB = uuid4(), uuid4()
NOW = 1_700_000_000.0


def shown(awareness: Awareness) -> dict[int, str]:
    return {each.entry.client: each.entry.state for each in awareness}


def test_socket_sets_the_state_of_its_own_client_only() -> None:
    awareness = Awareness()
    awareness.say("a", ALICE, [Entry(1, 1, "{}")], now=NOW)
    awareness.say("b", BOB, [Entry(2, 1, '{"x":1}')], now=NOW)
    relayed = awareness.say("b", BOB, [Entry(1, 99, '{"forged":true}'), Entry(2, 2, '{"x":2}')], now=NOW)
    assert relayed is not None
    assert relayed.client == 2
    assert awareness.say("b", BOB, [Entry(1, 100, GONE)], now=NOW) is None
    assert shown(awareness) == {1: "{}", 2: '{"x":2}'}


def test_socket_cannot_take_the_client_id_of_another() -> None:
    awareness = Awareness()
    awareness.say("a", ALICE, [Entry(1, 1, "{}")], now=NOW)
    assert awareness.say("b", BOB, [Entry(1, 9, '{"forged":true}')], now=NOW) is None
    assert shown(awareness) == {1: "{}"}


def test_returning_client_has_a_higher_clock_than_its_leave() -> None:
    awareness = Awareness()
    awareness.say("a", ALICE, [Entry(1, 5, "{}")], now=NOW)
    [left] = awareness.leave("a", now=NOW + 1)
    assert left.entry.state == GONE
    assert shown(awareness) == {}
    back = awareness.say("a2", ALICE, [Entry(1, 6, "{}")], now=NOW + 1)
    assert back is not None
    assert back.clock > left.entry.clock


def test_second_socket_of_the_same_client_takes_over() -> None:
    awareness = Awareness()
    awareness.say("a", ALICE, [Entry(1, 5, "{}")], now=NOW)
    assert awareness.say("a2", ALICE, [Entry(1, 6, '{"again":1}')], now=NOW + 1)
    assert awareness.leave("a", now=NOW + 2) == []
    assert shown(awareness) == {1: '{"again":1}'}


def test_state_from_another_process_is_new_only_once() -> None:
    awareness = Awareness()
    assert awareness.hear(Entry(1, 7, "{}"), owner="p2", user=ALICE, now=NOW)
    assert not awareness.hear(Entry(1, 7, "{}"), owner="p2", user=ALICE, now=NOW)
    assert awareness.hear(Entry(1, 8, GONE), owner="p2", user=ALICE, now=NOW)
    assert not awareness.hear(Entry(1, 8, "{}"), owner="p2", user=ALICE, now=NOW)


def test_stale_clients_are_pruned_and_connected_ones_are_renewed() -> None:
    awareness = Awareness()
    awareness.say("a", ALICE, [Entry(1, 1, "{}")], now=NOW)
    awareness.hear(Entry(2, 1, "{}"), owner="killed", user=BOB, now=NOW)
    assert awareness.renew(["a"], now=NOW + 1) == []
    [renewed] = awareness.renew(["a"], now=NOW + RENEW_SECONDS + 1)
    assert renewed.entry.client == 1
    [gone] = awareness.prune(now=NOW + STALE_SECONDS + 1)
    assert (gone.entry.client, gone.entry.state) == (2, GONE)


@pytest.mark.parametrize("state", ["{", "[]", "1", '"x"', "{" + " " * 20_000 + "}", ""])
def test_states_that_would_break_other_clients_are_rejected(state: str) -> None:
    with pytest.raises(Malformed):
        Awareness().say("a", ALICE, [Entry(1, 1, state)], now=NOW)


def test_number_of_clients_in_a_document_is_bounded() -> None:
    awareness = Awareness()
    for client in range(MOST_CLIENTS):
        awareness.say(f"{client}", ALICE, [Entry(client, 1, "{}")], now=NOW)
    with pytest.raises(Malformed, match="maximum of 1000 awareness states"):
        awareness.say("late", BOB, [Entry(MOST_CLIENTS, 1, "{}")], now=NOW)
    assert not awareness.hear(Entry(MOST_CLIENTS, 1, "{}"), owner="elsewhere", user=BOB, now=NOW)
    assert awareness.say("0", ALICE, [Entry(0, 2, '{"still":1}')], now=NOW)
    awareness.leave("0", now=NOW)
    assert awareness.say("late", BOB, [Entry(MOST_CLIENTS, 1, "{}")], now=NOW)
