"""Several hosts without their devices: who they are, how they join, and how one that is late or gone is named."""

import asyncio
import contextlib
import http.server
import os
import queue
import signal
import socket
import threading
import time
from dataclasses import replace

import grpc
import pytest

from jaxserve.client import supervise
from jaxserve.config import DeviceOptions, EngineOptions, HostOptions, HostPlace, ScheduleOptions, ServerOptions
from jaxserve.errors import ConfigError, EngineStopped
from jaxserve.hosts import CRASHED, DONE, GAVE_UP, LOST, REFUSED, identity, places
from jaxserve.hosts import messages as m
from jaxserve.hosts.follower import Follower
from jaxserve.hosts.leader import Leader
from jaxserve.hosts.watch import Watch

LWS = {"LWS_LEADER_ADDRESS": "a-0.a.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[007-009]"}


def told(environ, **options):
    found = places.place(HostOptions(**{"hosts": "auto", "host_secret": "s"} | options), environ)
    return found and (found.index, found.count, found.coordinator, found.port)


# --- who they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        (LWS, (2, 4, "a-0.a.default", 8900)),
        (LWS | GKE | SLURM, (2, 4, "a-0.a.default", 8900)),
        (GKE, (1, 2, "t-0.svc", 8900)),
        (SLURM, (1, 3, "n007", 8900)),
        (SLURM | {"SLURM_STEP_NODELIST": "alone,n[1-2]"}, (1, 3, "alone", 8900)),
        (SLURM | {"SLURM_STEP_NODELIST": "n[3,5]"}, (1, 3, "n3", 8900)),
        (LWS | {"LWS_GROUP_SIZE": "1", "LWS_WORKER_INDEX": "0"}, None),
    ],
)
def test_the_place_is_what_started_the_host_says(environ, place):
    assert told(environ) == place


def test_options_go_before_the_environment():
    assert told(LWS, coordinator="10.0.0.9:77", host_index=3) == (3, 4, "10.0.0.9", 77)
    assert told(SLURM, hosts=2, coordinator="[::1]:77", host_index=0) == (0, 2, "::1", 77)
    assert told({}, hosts=1) is None
    one = places.place(HostOptions(hosts=2, host_index=1, coordinator="h", host_timeout=6, host_secret="xyz"), {})
    assert one.timeout_s == 6 and "xyz" not in repr(one)


def test_a_tpu_vm_asks_its_metadata_server():
    answers = {"agent-worker-number": "1", "worker-network-endpoints": "a:0:10.0.0.1,b:1:10.0.0.2"}

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.headers["Metadata-Flavor"] == "Google" else 403)
            self.end_headers()
            self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert told({"GCE_METADATA_IP": f"127.0.0.1:{server.server_address[1]}"}) == (1, 2, "10.0.0.1", 8900)
        server.shutdown()


NOWHERE = {"GCE_METADATA_IP": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("environ", "options", "message"),
    [
        (NOWHERE, {}, "nothing here says which of several hosts this is; give --hosts N, --host-index"),
        (NOWHERE, {"hosts": 2, "host_index": 0}, "nothing here says"),
        ({}, {"hosts": 2, "host_index": 2, "coordinator": "h"}, "host_index 2 is none of 2 hosts"),
        ({}, {"hosts": 2, "host_index": 1, "coordinator": "h:x"}, "coordinator 'h:x' is no address"),
        ({}, {"hosts": 2, "host_index": 1, "coordinator": "h:70000"}, "is no address; give HOST or HOST:PORT"),
        ({}, {"hosts": 1, "host_index": 0}, "host_index is for several hosts; say how many with --hosts"),
        (LWS, {"hosts": 3}, "hosts is 3, and LeaderWorkerSet says 4"),
        (LWS, {"host_secret": None}, "set JAXSERVE_HOST_SECRET to the same value on each"),
        (LWS | {"LWS_GROUP_SIZE": "x"}, {}, "LWS_GROUP_SIZE is 'x', which is no number"),
        (GKE | {"MEGASCALE_NUM_SLICES": "2"}, {}, "several slices of TPUs are not served as one engine"),
        (SLURM | {"SLURM_NTASKS": "12"}, {}, "Slurm runs 12 tasks on 3 nodes; run one on each"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environ, options, message):
    with pytest.raises(ConfigError, match=message):
        told(environ, **options)


@pytest.mark.parametrize("options", [{"hosts": 0}, {"host_index": -1}, {"host_timeout": 0}, {"host_start_timeout": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        HostOptions(**options)


@pytest.mark.parametrize(
    ("mesh", "server", "message"),
    [
        (None, {}, "several hosts need --mesh"),
        ("2x4", {}, "mesh 2x4: several hosts are one replica over all their devices; give data=1"),
        ("1x8", {"in_process": True}, "in_process is not served with several hosts"),
        ("1x8", {"reload": True}, "reload is not served"),
        ("1x8", {"admin_key": "k"}, "admin_key is not served"),
    ],
)
def test_what_several_hosts_do_not_serve_is_refused(mesh, server, message):
    with pytest.raises(ConfigError, match=message):
        places.check_served(EngineOptions(device=DeviceOptions(mesh=mesh)), ServerOptions(**server))


def test_what_hosts_must_have_alike(tmp_path):
    place = HostPlace(index=1, count=2, coordinator="h", port=1, secret="s")
    options = EngineOptions(place=place, device=DeviceOptions(mesh="1x8", compile_cache_dir="/a"))
    paths = [tmp_path / name for name in "ab"]
    for path in paths:
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"1")
    environ = {"XLA_FLAGS": "x", "JAX_COMPILATION_CACHE_DIR": "/a", "HOME": "/b"}
    here = identity.describe(options, paths[0], environ)
    elsewhere = replace(options, place=replace(place, index=0), device=replace(options.device, compile_cache_dir="/b"))
    assert identity.differences(here, identity.describe(elsewhere, paths[1], environ | {"HOME": "/c"})) == []
    (paths[1] / "model.safetensors").write_bytes(b"2")
    other = replace(options, schedule=ScheduleOptions(max_num_seqs=3), place=replace(place, count=3))
    found = identity.differences(here, identity.describe(other, paths[1], {"JAX_ENABLE_X64": "1"}))
    assert [line.partition(" is ")[0] for line in found] == [
        "JAX_ENABLE_X64", "XLA_FLAGS", "checkpoint", "hosts", "max_num_seqs"
    ]  # fmt: skip
    assert found[-1] == "max_num_seqs is 3 there, None on host 0"


# --- how a follower's process is started again -----------------------------------------------------------------------


def follow(tmp_path, monkeypatch, *codes, kill=0):
    """The exit code of a follower whose engine processes end with these ones, and how many there were."""
    program, count = tmp_path / "engine", tmp_path / "count"
    cases = " ".join(f"{i}) exit {code};;" for i, code in enumerate(codes, 1))
    program.write_text(f"#!/bin/sh\necho >> {count}\ncase $(wc -l < {count}) in {cases} *) exec sleep 60;; esac\n")
    program.chmod(0o755)
    monkeypatch.setattr(supervise.sys, "executable", str(program))
    monkeypatch.setattr(supervise, "FIRST_BACK_OFF_S", 0.01)
    options = EngineOptions(place=HostPlace(index=1, count=2, coordinator="h", port=1, secret="s"))

    async def signals():
        while not count.exists() or count.read_text().count("\n") <= len(codes):
            await asyncio.sleep(0.01)
        for _ in range(kill):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)

    async def run():
        told = asyncio.create_task(signals())  # noqa: F841, so that it is kept
        return await supervise.follow(options, tmp_path, drain_s=-supervise.SLACK_S if kill == 1 else 60)

    return asyncio.run(run()), count.read_text().count("\n")


@pytest.mark.parametrize(
    ("codes", "code"),
    [((DONE,), 0), ((REFUSED,), 2), ((GAVE_UP,), 1), ((LOST, CRASHED, DONE), 0), ((LOST, REFUSED), 2)],
)
def test_an_engine_process_is_started_again_if_that_may_help(tmp_path, monkeypatch, codes, code):
    assert follow(tmp_path, monkeypatch, *codes) == (code, len(codes))


@pytest.mark.parametrize("kill", [1, 2], ids=["when the leader's drain is over", "a second one at once"])
def test_signals_end_a_follower(tmp_path, monkeypatch, kill):
    assert follow(tmp_path, monkeypatch, LOST, kill=kill) == (0, 2)


# --- who is late ----------------------------------------------------------------------------------------------------


class Clock:
    """A watch over hosts 1 and 2, and its time, which goes on in steps of a second."""

    def __init__(self, timeout_s=5.0):
        self.watch = Watch({1: "one", 2: "two"}, timeout_s, 100.0)
        self.now = 100.0

    def run(self, seconds, alive=(1, 2)):
        for _ in range(seconds):
            self.now += 1
            self.watch.tick(self.now)
            for index in alive:
                self.watch.heard(index)
        return self.watch.late()


def test_hosts_that_keep_up_are_not_late():
    clock = Clock()
    for number in range(1, 20):
        clock.watch.announced(number)
        for index in (1, 2):
            clock.watch.begun(index, number)
            clock.watch.confirmed(index, number, b"t")
        clock.watch.finished_here(number, b"t")
        assert clock.run(3) == ""
    assert clock.run(100) == "", "nothing to do"


def test_a_host_that_does_not_begin_a_step_is_named():
    clock = Clock()
    clock.watch.announced(841)
    clock.watch.announced(842)
    clock.watch.begun(1, 842)
    assert clock.run(5) == ""
    assert clock.run(1) == "host 2 (two) has not confirmed step 841 for 6 s"


def test_but_not_while_it_compiles_and_says_so():
    clock = Clock()
    clock.watch.announced(1)
    clock.watch.begun(1, 1)
    clock.watch.heard(2, "compiling")
    assert clock.run(60) == ""
    clock.watch.heard(2, "")
    assert clock.run(5) == "", "it has as long as ever from then on"
    clock.watch.begun(2, 1)
    clock.watch.announced(2)
    clock.watch.begun(1, 2)
    assert clock.run(6) == "host 2 (two) has not confirmed step 2 for 6 s"


def test_a_host_that_does_not_finish_what_this_one_has_is_named():
    clock = Clock()
    clock.watch.announced(1)
    for index in (1, 2):
        clock.watch.begun(index, 1)
    assert clock.run(60) == "", "nobody has finished: a long step"
    clock.watch.confirmed(1, 1, b"t")
    clock.watch.finished_here(1, b"t")
    assert clock.run(6) == "host 2 (two) has not finished step 1, which this host did 6 s ago"


def test_a_silent_host_is_named():
    clock = Clock()
    assert clock.run(6, alive=(2,)) == "host 1 (one) has not been heard of for 6 s"


def test_a_host_that_falls_silent_before_a_step_is_named_with_it():
    clock = Clock()
    assert clock.run(2, alive=(2,)) == ""
    clock.watch.announced(9)
    clock.watch.begun(2, 9)
    words = "host 1 (one) has not confirmed step 9 for 4 s and not been heard of for 6 s"
    assert clock.run(4, alive=(2,)) == words


def test_one_that_falls_silent_as_it_compiles_is_not_blamed_for_a_step():
    clock = Clock()
    clock.watch.heard(1, "compiling")
    clock.watch.announced(9)
    clock.watch.begun(2, 9)
    assert clock.run(6, alive=(2,)) == "host 1 (one) has not been heard of for 6 s"


@pytest.mark.parametrize("first", ["here", "there"])
def test_a_host_that_samples_other_tokens_is_named(first):
    clock = Clock()
    clock.watch.announced(7)
    reports = [lambda: clock.watch.finished_here(7, b"t"), lambda: clock.watch.confirmed(2, 7, b"u")]
    for report in reports if first == "here" else reports[::-1]:
        assert clock.watch.late() == ""
        report()
    assert clock.watch.late() == "host 2 (two) sampled other tokens in step 7 than this host"


def test_the_time_in_which_this_process_did_not_run_is_nobodys_delay():
    clock = Clock()
    clock.now += 1000
    clock.watch.tick(clock.now)
    assert clock.watch.late() == ""
    assert clock.run(5, alive=(2,)) == "host 1 (one) has not been heard of for 6 s"


# --- what they say --------------------------------------------------------------------------------------------------


def test_a_chain_takes_what_was_sent_in_its_order_only():
    def pair():
        return m.Chain(b"key"), m.Chain(b"key")

    sender, receiver = pair()
    assert [bytes(receiver.open(sender.seal(text))) for text in (b"a", b"", b"c")] == [b"a", b"", b"c"]
    frames = [sender.seal(text) for text in (b"d", b"e")]
    for wrong in (frames[1], frames[0][:-1] + b"x", b"", b"short"):
        other_sender, receiver = pair()
        for text in (b"a", b"", b"c"):
            receiver.open(other_sender.seal(text))
        with pytest.raises(m.BrokenChain, match="message 4 is not the one that was sent"):
            receiver.open(wrong)
    with pytest.raises(m.BrokenChain):
        m.Chain(b"other").open(pair()[0].seal(b"a"))


class Job:
    """A leader and followers in this process; where a follower's process would end is what is told in `ended`."""

    def __init__(self, timeout_s=0.6, count=2, alike=None):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.place = HostPlace(
            index=0, count=count, coordinator="127.0.0.1", port=port, secret="s", timeout_s=timeout_s,
            start_timeout_s=20,
        )  # fmt: skip
        self.alike = {"jax": "1", "max_num_seqs": "64"}
        self.ended, self.lost = queue.Queue(), queue.Queue()

    def lead(self, **options):
        self.leader = Leader(self.place, self.alike, lost=self.lost.put, **options)
        return self.leader

    def follow(self, index=1, secret="s", **differs):
        place = replace(self.place, index=index, secret=secret)

        def end(message, code):
            self.ended.put((message, code))
            follower._channel.close()
            if threading.current_thread() is not threading.main_thread():
                threading.Event().wait()  # a thread of the follower, which is a daemon
            raise SystemExit

        follower = Follower(place, self.alike | differs, end)
        return follower

    def gathered(self, *followers):
        for follower in followers:
            follower.join()
        self.leader.gather(lambda message: None)
        self.leader.welcome(77)
        assert [f.welcomed() for f in followers] == [77] * len(followers)

    def end(self):
        """How a follower's process ended: message and code."""
        return self.ended.get(timeout=10)


@pytest.fixture
def job():
    job = Job()
    job.leader = None
    yield job
    if job.leader is not None:
        job.leader.stop()


@pytest.fixture
def pair(job):
    """A job of two hosts that have joined."""
    job.lead()
    job.follower = job.follow()
    job.gathered(job.follower)
    return job


@pytest.fixture
def serving(pair):
    """A job that was ready."""
    pair.follower.ready("sizes", list)
    pair.leader.wait_ready("sizes", lambda message: None)
    return pair


def test_hosts_join_agree_and_run_the_same_launches(job):
    job.place = replace(job.place, count=3)
    leader = job.lead()
    followers = [job.follow(1), job.follow(2)]
    job.gathered(*followers)
    got = []
    asked = [threading.Thread(target=lambda f=f: got.append(f.least(4 + f._place.index))) for f in followers]
    for thread in asked:
        thread.start()
    assert leader.least(6) == 5
    for thread in asked:
        thread.join()
    assert got == [5, 5]
    shapes = [[(8, 2)], [(8, 2), (1, 1)]]
    for follower, some in zip(followers, shapes, strict=True):
        follower.ready("sizes", lambda some=some: some)
    leader.wait_ready("sizes", lambda message: None)
    assert leader.known((8, 2)) and not leader.known((1, 1))
    for number in (1, 2, 3):
        assert leader.announce((8, 2), b"buffer", [[b"slot", b"history"]]) == number
        for follower in followers:
            step = next(follower.steps())
            assert step == m.Step(number, (8, 2), b"buffer", [[b"slot", b"history"]])
            follower.begin(number)
            follower.confirm(number, b"tokens")
        leader.finished(number, b"tokens")
    assert leader.failure(0.2) is None
    leader.stop()
    assert {job.end(), job.end()} == {("host 0 has stopped", DONE)}


def test_a_follower_that_is_not_like_its_leader_is_refused_and_both_say_what_differs(job):
    leader = job.lead()
    said = r"host 1 \(.* 127.0.0.1\) is not like host 0: jax is 2 there, 1 on host 0; max_num_seqs is not set there, 64"
    other = job.follow(jax="2")
    del other._identity["max_num_seqs"]
    with pytest.raises(ConfigError, match=said):
        other.join()
    with pytest.raises(ConfigError, match=said):
        leader.gather(lambda message: None)
    assert "max_num_seqs" in job.lost.get(timeout=5).message


def test_who_does_not_know_the_secret_is_refused_and_does_no_harm(job, caplog):
    leader = job.lead()
    with pytest.raises(ConfigError, match="has another host_secret; set JAXSERVE_HOST_SECRET"):
        job.follow(secret="another").join()
    with grpc.insecure_channel(f"127.0.0.1:{job.place.port}") as channel:
        call = channel.stream_stream(m.STREAM, None, None)
        for said in ([b"\xff\xff"], [m.encode(m.Ready("", []))], []):
            assert list(call(iter(said))) == []
        forged = iter([m.encode(m.Hello(1, b"n")), m.encode(m.Join(b"proof", "me", job.alike))])
        assert [type(m.decode_to_follower(frame)) for frame in call(forged)] == [m.Challenge]
    assert "wanted to join and could not: it does not know the secret" in caplog.text
    job.gathered(job.follow())
    assert leader.failure(0.1) is None


def test_a_place_that_is_taken_or_is_none_is_refused(job):
    job.place = replace(job.place, count=3)
    job.lead()
    job.follow(1).join()
    with pytest.raises(SystemExit):
        job.follow(1).join()
    message, code = job.end()
    assert "there is a host 1 already" in message and code == LOST
    for index in (0, 3):
        with pytest.raises(ConfigError, match=f"host_index {index} is none of a follower, 1 to 2"):
            job.follow(index).join()


def test_a_host_may_leave_and_come_again_before_all_are_there(job):
    job.place = replace(job.place, count=3)
    leader = job.lead()
    first = job.follow(1)
    first.join()
    first._channel.close()
    deadline = time.monotonic() + 5
    while leader._followers and time.monotonic() < deadline:
        time.sleep(0.01)
    job.gathered(job.follow(1), job.follow(2))


def test_those_who_do_not_come_are_named_and_waited_for_no_longer_than_asked(job):
    job.place = replace(job.place, count=3, start_timeout_s=0.5)
    leader, said = job.lead(), []
    job.follow(2).join()
    with pytest.raises(EngineStopped, match="host 1 did not join within 0.5 s; start the same command there"):
        leader.gather(said.append)
    assert said[0] == f"waiting for host 1 of 3 to join at port {job.place.port}"
    assert job.end()[1] == GAVE_UP


def test_a_leader_who_does_not_come_is_waited_for_no_longer_than_asked(job):
    job.place = replace(job.place, start_timeout_s=0.3)
    with pytest.raises(SystemExit):
        job.follow().join()
    assert job.end() == (f"host 0 (127.0.0.1:{job.place.port}) did not answer for 0.3 s", GAVE_UP)


def test_a_port_that_is_taken_is_told_with_the_cure(job):
    job.lead()
    with pytest.raises(ConfigError, match="is another server running. give another port with --coordinator"):
        Leader(job.place, {})


def names_host_1(job, what):
    """The leader says so, to whom it belongs and to its follower, within seconds."""
    error = job.lost.get(timeout=5)
    assert isinstance(error, EngineStopped) and error.message.startswith("host 1 (") and what in error.message
    with pytest.raises(EngineStopped, match=what):
        job.leader.announce((1, 1), b"", [])


def test_a_host_that_ends_is_named(pair):
    pair.follower._channel.close()
    names_host_1(pair, "ended")


def test_a_host_that_falls_silent_is_named_and_all_start_again(serving):
    serving.follower._tell = lambda message: None
    names_host_1(serving, "has not been heard of for 1 s")
    message, code = serving.end()
    assert message.startswith("host 0 starts again: host 1 (") and code == LOST


def test_but_while_weights_are_loaded_silence_is_no_news(pair):
    pair.follower._tell = pair.leader._tell = lambda message: None
    assert pair.leader.failure(1.5) is None and pair.ended.empty()


def test_a_host_that_is_stuck_is_named_with_its_step(serving):
    serving.leader.announce((1, 1), b"", [])
    names_host_1(serving, "has not confirmed step 1 for 1 s")


def test_what_ends_a_host_is_said_by_its_leader(pair, monkeypatch):
    monkeypatch.setattr("jaxserve.hosts.follower._LAST_WORDS_S", 0.1)
    with contextlib.suppress(SystemExit):
        pair.follower.fail(ConfigError("weights do not fit"))
    error = pair.lost.get(timeout=5)
    assert isinstance(error, ConfigError) and error.message.endswith("127.0.0.1): weights do not fit")
    assert pair.end()[1] == REFUSED


def test_a_message_that_was_not_sent_is_named(pair):
    pair.follower._outbound.seal(b"lost on the way")
    pair.follower.doing("")
    names_host_1(pair, "is not the one that was sent")


def test_hosts_that_worked_out_other_sizes_are_named(pair):
    pair.follower.ready("pages=7", list)
    with pytest.raises(EngineStopped, match=r"host 1 \(.*\) worked out pages=7, this host pages=8"):
        pair.leader.wait_ready("pages=8", lambda message: None)


def test_a_follower_notices_a_leader_that_ends(pair):
    pair.leader._server.stop(0)
    message, code = pair.end()
    assert message.endswith("ended") and "host 0 (127.0.0.1" in message and code == LOST


def test_a_follower_notices_a_leader_that_falls_silent(serving):
    serving.leader._tell = lambda message: None
    message, code = serving.end()
    assert "host 0 (127.0.0.1" in message and "has not been heard of for 1 s" in message and code == LOST


def test_a_follower_notices_a_changed_message(pair):
    pair.leader._chain.seal(b"never sent")
    pair.leader._tell(m.Ping())
    message, code = pair.end()
    assert "is not the one that was sent" in message and code == LOST


@pytest.mark.parametrize(
    ("again", "error", "code"),
    [
        (False, None, DONE),
        (False, ConfigError("no"), REFUSED),
        (False, EngineStopped("no"), GAVE_UP),
        (True, None, DONE),
        (True, ConfigError("no"), LOST),
        (True, EngineStopped("no"), LOST),
    ],
)
def test_followers_start_again_if_their_leader_does(job, again, error, code):
    job.lead(again=again)
    job.gathered(job.follow())
    job.leader.stop(error)
    message, found = job.end()
    assert found == code and (error is None or message.endswith(": no"))
