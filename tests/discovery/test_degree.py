"""How many connections a process keeps, and to whom."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sparkle_mesh import limits
from sparkle_mesh.discovery.degree import Degree
from sparkle_mesh.discovery.directory import EXCHANGE, HOST, JOIN, LAN, Directory, Hint
from tests.entropies import SeededEntropy

TARGET = limits.NODE_DEGREE_TARGET_COUNT
MAX = limits.NODE_DEGREE_MAX_COUNT
RIPE_S = limits.DEGREE_GRACE_S
NEAR, CHOSEN, INBOUND = (
    limits.NODE_DEGREE_NEAR_COUNT,
    limits.NODE_DEGREE_CHOSEN_COUNT,
    limits.NODE_DEGREE_INBOUND_COUNT,
)


def filled(
    degree: Degree, count: int, *, role: str = "node", name: str = "peer", now: float = 0.0, **more
) -> list[str]:
    names = [f"{name}{number}" for number in range(count)]
    for number, peer_id in enumerate(names):
        degree.came(peer_id, now + number / 1000, **more)
        degree.introduced(peer_id, role, same_host=False)
    return names


def nearest(degree: Degree, count: int) -> list[str]:
    return [n.peer_id for n in sorted(degree.neighbours(), key=lambda n: n.distance)[:count]]


def hint(peer_id: str, source: str = EXCHANGE, role: str = "node", **more) -> Hint:
    return Hint(peer_id, (f"/ip4/10.0.{len(peer_id)}.1/tcp/4001",), source, role=role, **more)


def dialed(directory: Directory, now: float) -> list[str]:
    """Whom it dials until it dials nobody any more, if all can be reached."""
    found: list[str] = []
    while dials := directory.due(now):
        for dial in dials:
            directory.connected(dial.peer_id, now, outbound=True)
            directory.dial_succeeded(dial.peer_id, now)
            found.append(dial.peer_id)
    return found


def test_a_node_lets_nobody_go_up_to_its_bound():
    degree = Degree("me", "node")
    filled(degree, MAX)
    assert degree.surplus(1000.0) == []


def test_beyond_it_who_came_last_goes_but_not_at_once():
    degree = Degree("me", "node")
    filled(degree, MAX)
    late = filled(degree, 3, name="late", now=100.0)
    near = set(nearest(degree, NEAR))
    assert degree.surplus(100.0 + RIPE_S - 1) == [] or not set(degree.surplus(100.0 + RIPE_S - 1)) & set(late)
    gone = degree.surplus(101.0 + RIPE_S)
    assert len(gone) == 3
    assert set(late) - near <= set(gone)


def test_whoever_was_not_introduced_is_left_to_the_door():
    degree = Degree("me", "node")
    for number in range(MAX + 5):
        degree.came(f"stranger{number}", 0.0)
    assert degree.surplus(1000.0) == []


def test_the_configured_the_near_the_chosen_and_the_oldest_stay_whoever_comes():
    degree = Degree("me", "node")
    kept = {
        *filled(degree, 2, name="configured", configured=True),
        *filled(degree, CHOSEN, name="chosen", chosen=True),
        *filled(degree, INBOUND, name="old"),
    }
    filled(degree, 400, name="crowd", now=10.0)
    kept |= set(nearest(degree, NEAR))
    gone = set()
    for _ in range(3):
        for peer_id in degree.surplus(1000.0):
            gone.add(peer_id)
            degree.went(peer_id)
    assert not gone & kept
    assert len(degree) == MAX


def test_a_relay_and_whom_it_relays_for_stay_connected():
    needed = {"needed0", "needed1"}
    degree = Degree("me", "node", is_needed=needed.__contains__)
    kept = filled(degree, 2, name="needed")
    filled(degree, 2 * limits.NODE_DEGREE_MAX_COUNT)
    gone = set(degree.surplus(1000.0))
    assert gone
    assert not gone & set(kept)
    needed.clear()
    trainer = Degree("me", "trainer", is_needed=lambda peer_id: peer_id == "node3")
    filled(trainer, 3 * limits.TRAINER_NODES_MAX_COUNT, name="node")
    assert "node3" not in trainer.surplus(1000.0)


def test_of_a_crowd_in_one_network_the_last_goes_first():
    degree = Degree("me", "node")
    filled(degree, MAX - 4, name="spread")
    crowd = filled(degree, 8, name="crowd", now=1.0, remote_address="/ip4/8.8.8.8/tcp/1")
    late = filled(degree, 2, name="late", now=50.0)
    gone = degree.surplus(1000.0)
    assert len(gone) == 6
    assert set(gone) <= set(crowd)
    assert not set(gone) & set(late)


def test_what_the_dht_uses_stays_while_it_does():
    degree = Degree("me", "node")
    busy = filled(degree, 3 * MAX, name="busy")
    for peer_id in busy:
        degree.used(peer_id, 100.0)
    assert degree.surplus(100.0 + limits.DEGREE_BUSY_S - 1) == []
    assert len(degree.surplus(100.0 + limits.DEGREE_BUSY_S)) == 2 * MAX
    many = filled(degree, limits.NODE_DEGREE_BUSY_MAX_COUNT + 5, name="flood", now=200.0)
    for peer_id in [*busy, *many]:
        degree.used(peer_id, 300.0)
    assert len(degree.surplus(300.0)) == len(degree) - limits.NODE_DEGREE_BUSY_MAX_COUNT - MAX


def test_who_was_only_asked_something_goes_when_idle_if_others_are_enough():
    degree = Degree("me", "node")
    filled(degree, TARGET, chosen=True)
    asked = filled(degree, 3, name="asked", asked=True)
    for peer_id in asked:
        degree.used(peer_id, 10.0)
    assert degree.surplus(10.0 + limits.DEGREE_IDLE_S - 1) == []
    assert set(degree.surplus(10.0 + limits.DEGREE_IDLE_S)) == set(asked) - set(nearest(degree, NEAR))
    lonely = Degree("me", "node")
    filled(lonely, 3, name="asked", asked=True)
    assert lonely.surplus(1000.0) == []


def test_a_trainer_keeps_all_trainers_and_few_nodes_those_of_its_host_among_them():
    degree = Degree("me", "trainer")
    filled(degree, 300, role="trainer", name="trainer")
    nodes = filled(degree, limits.TRAINER_NODES_MAX_COUNT + 10)
    degree.introduced(nodes[-1], "node", same_host=True)
    gone = degree.surplus(1000.0)
    assert len(gone) == 10
    assert set(gone) < set(nodes[:-1])


def test_a_node_keeps_the_trainers_of_its_host_and_some_others():
    degree = Degree("me", "node")
    trainers = filled(degree, limits.NODE_DEGREE_TRAINERS_MAX_COUNT + 10, role="trainer")
    for peer_id in trainers[-5:]:
        degree.introduced(peer_id, "trainer", same_host=True)
    gone = degree.surplus(1000.0)
    assert len(gone) == 10
    assert not set(gone) & set(trainers[-5:])


# --- With the directory ------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [EXCHANGE, HOST, LAN])
def test_a_small_mesh_is_complete_and_a_large_one_is_not(source):
    for count, expected in ((TARGET, TARGET), (500, TARGET)):
        degree = Degree("me", "node")
        directory = Directory("me", entropy=SeededEntropy(), degree=degree)
        for number in range(count):
            directory.heard(hint(f"peer{number}", source), 0.0)
        found = dialed(directory, 10.0)
        near = len(found) - expected
        # Beyond what it aims at there are those that are nearer than the nearest before.
        assert 0 <= near <= NEAR
        assert directory.next_wakeup(10.0) is None


def test_among_equals_it_is_drawn_whom_to_dial():
    firsts = set()
    for seed in range(20):
        directory = Directory("me", entropy=SeededEntropy(seed), degree=Degree("me", "node"))
        for number in range(100):
            directory.heard(hint(f"peer{number}"), 0.0)
        firsts.add(directory.due(10.0)[0].peer_id)
    assert len(firsts) > 10


def test_those_that_are_given_are_dialed_however_many_there_are():
    degree = Degree("me", "node")
    directory = Directory("me", entropy=SeededEntropy(), degree=degree)
    filled(degree, MAX, chosen=True)
    for number in range(30):
        directory.heard(hint(f"given{number}", JOIN), 0.0)
    assert len(dialed(directory, 10.0)) == 30


def test_a_trainer_dials_every_trainer_and_few_nodes_its_hosts_first():
    directory = Directory("me", entropy=SeededEntropy(), degree=Degree("me", "trainer"))
    for number in range(100):
        directory.heard(hint(f"node{number}"), 0.0)
    directory.heard(hint("mine", HOST, same_host=True), 0.0)
    for number in range(50):
        directory.heard(hint(f"trainer{number}", role="trainer"), 0.0)
    found = dialed(directory, 10.0)
    assert sum(peer_id.startswith("trainer") for peer_id in found) == 50
    assert len(found) == 50 + limits.TRAINER_NODES_TARGET_COUNT
    assert "mine" in found


def test_whoever_is_said_to_be_a_trainer_is_dialed_though_others_say_it_is_a_node():
    directory = Directory("me", entropy=SeededEntropy(), degree=Degree("me", "trainer"))
    for number in range(10):
        directory.heard(hint(f"node{number}"), 0.0)
    assert len(dialed(directory, 10.0)) == limits.TRAINER_NODES_TARGET_COUNT
    directory.heard(hint("hidden"), 11.0)
    directory.heard(hint("hidden", role="trainer"), 11.0)
    directory.heard(hint("hidden"), 11.0)
    assert dialed(directory, 20.0) == ["hidden"]


def test_who_has_enough_is_left_alone_for_long_and_by_the_lonely_for_a_moment():
    directory = Directory("me", entropy=SeededEntropy(), degree=Degree("me", "node"))
    directory.heard(hint("a", JOIN), 0.0)
    directory.heard(hint("b"), 0.0)
    assert sorted(dialed(directory, 1.0)) == ["a", "b"]
    directory.spared("b", 50.0)
    directory.disconnected("b", 50.0)
    assert directory.get("b").failures == 0
    assert not directory.heard(hint("b", fresh=True), 51.0)
    assert directory.due(50.0 + 0.7 * limits.SPARED_BACKOFF_S) == []
    directory.disconnected("a", 60.0)
    directory.connected("a", 61.0)
    directory.spared("a", 100.0)
    directory.disconnected("a", 100.0)
    (dial,) = directory.due(100.0 + 1.3 * limits.SPARED_ALONE_BACKOFF_S)
    assert dial.peer_id == "a"
    # Nor does it count against it when it is reached again.
    directory.dial_succeeded("a", 120.0)
    directory.disconnected("a", 130.0)
    assert directory.due(135.0)


def test_made_up_peers_do_not_displace_honest_ones():
    degree = Degree("me", "node")
    directory = Directory("me", entropy=SeededEntropy(), degree=degree)
    for number in range(MAX):
        directory.connected(f"honest{number}", float(number))
        degree.introduced(f"honest{number}", "node", same_host=False)
    before = {neighbour.peer_id for neighbour in degree.neighbours()}
    now = 100.0
    for number in range(5000):
        directory.heard(hint(f"made-up{number}", role="trainer" if number % 2 else "node"), now)
    for _ in range(50):
        for dial in directory.due(now):
            directory.dial_failed(dial.peer_id, now, "nobody is there")
        now += 10.0
    assert {neighbour.peer_id for neighbour in degree.neighbours()} == before
    assert degree.surplus(now) == []


class DegreeMachine(RuleBasedStateMachine):
    """A world that does anything."""

    @initialize(role=st.sampled_from(["node", "trainer"]))
    def start(self, role):
        self.role, self.now = role, 0.0
        self.degree = Degree("me", role)
        self.configured: set[str] = set()

    @rule(
        number=st.integers(0, 99),
        role=st.sampled_from(["node", "trainer"]),
        chosen=st.booleans(),
        asked=st.booleans(),
        configured=st.booleans(),
        network=st.integers(0, 3),
        same_host=st.booleans(),
    )
    def come(self, number, role, chosen, asked, configured, network, same_host):
        peer_id = f"peer{number}"
        known = {neighbour.peer_id for neighbour in self.degree.neighbours()}
        address = f"/ip4/8.8.{network}.1/tcp/1" if network else None
        self.degree.came(peer_id, self.now, chosen=chosen, asked=asked, configured=configured, remote_address=address)
        self.degree.introduced(peer_id, role, same_host=same_host)
        if configured and peer_id not in known:
            self.configured.add(peer_id)

    @rule(start=st.integers(0, 80), role=st.sampled_from(["node", "trainer"]))
    def crowd(self, start, role):
        for number in range(start, start + 20):
            self.come(number, role, False, False, False, 0, False)

    @rule(number=st.integers(0, 99))
    def use(self, number):
        self.degree.used(f"peer{number}", self.now)

    @rule(number=st.integers(0, 99))
    def go(self, number):
        self.degree.went(f"peer{number}")
        self.configured.discard(f"peer{number}")

    @rule(seconds=st.sampled_from([1.0, 20.0, 100.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def let_go(self):
        for peer_id in self.degree.surplus(self.now):
            self.degree.went(peer_id)
        assert self.degree.surplus(self.now) == []

    @invariant()
    def the_surplus_is_right(self):
        known = {neighbour.peer_id: neighbour for neighbour in self.degree.neighbours()}
        gone = self.degree.surplus(self.now)
        assert len(set(gone)) == len(gone)
        assert set(gone) <= known.keys() - self.configured
        if self.role == "trainer":
            assert all(known[peer_id].role == "node" for peer_id in gone)
        # Nobody is let go where few are left.
        assert not gone or len(known) - len(gone) >= limits.TRAINER_NODES_MAX_COUNT

    @invariant()
    def few_are_wished_for_beyond_the_bound(self):
        wish = self.degree.wish(0)
        if len(self.degree) >= TARGET:
            assert wish.room <= CHOSEN
        assert wish.all_trainers == (self.role == "trainer")


TestDegreeMachine = DegreeMachine.TestCase
TestDegreeMachine.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
