"""The benchmark's reading and arithmetic, and its client against an echo of our own; no lab."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from ftvm_lab import bench_client, bench_figures, bench_plots, bench_probes, bench_work
from ftvm_lab.bench_figures import Epochs, Snapshot
from ftvm_lab.bench_work import Outcome, fitting, read_redis, read_wrk
from ftvm_lab.command import LabError

WRK = """Running 2s test @ http://10.88.0.100:80/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency    18.56ms   53.14ms 662.45ms   95.88%
    Req/Sec     1.74k   428.94     2.33k    70.00%
  Latency Distribution
     50%    3.60ms
     75%    9.01ms
     90%  850.00us
     99%    1.20s
  3479 requests in 2.02s, 2.79MB read
  Socket errors: connect 0, read 1, write 0, timeout 2
  Non-2xx or 3xx responses: 4
Requests/sec:   1720.02
Transfer/sec:      1.38MB
"""
REDIS = """some warning before it
"test","rps","avg_latency_ms","min_latency_ms","p50_latency_ms","p95_latency_ms","p99_latency_ms","max_latency_ms"
"SET","1000.00","1.0","0.1","2.000","3.0","30.879","40.0"
"GET","3000.00","1.0","0.1","4.000","3.0","20.000","40.0"
"""


def test_wrk_is_read_with_its_units_and_its_errors() -> None:
    found = read_wrk(WRK)
    assert (found.throughput, found.rtt_ms_p50, found.rtt_ms_p99, found.errors) == (1720.02, 3.6, 1200.0, 7)


def test_a_wrk_that_reached_nobody_is_an_error() -> None:
    with pytest.raises(LabError, match="unable to connect"):
        read_wrk("unable to connect to 10.88.0.100:80 Connection refused\n")


def test_redis_rate_is_that_of_all_requests_and_its_tail_the_worst() -> None:
    found = read_redis(REDIS)
    assert (found.throughput, found.rtt_ms_p50, found.rtt_ms_p99) == (1500.0, 3.0, 30.879)


def test_a_redis_that_reached_nobody_is_an_error() -> None:
    with pytest.raises(LabError, match="Could not connect"):
        read_redis("Could not connect to Redis at 10.88.0.100:6379\n")


def test_work_of_a_fixed_amount_is_tried_until_it_takes_long_enough_to_be_measured() -> None:
    tried = []

    def measure(amount: int) -> float:
        tried.append(amount)
        return amount / 1000

    assert fitting(100, measure, 8.0) == 8000
    assert tried == [100, 400, 1600]


def test_every_quick_workload_is_one_of_the_full_run() -> None:
    assert {one.name for one in bench_work.quick()} == set(bench_work.QUICK)
    names = [one.name for one in bench_work.full()]
    assert len(set(names)) == len(names)


def test_goals_say_what_was_reached_and_what_was_not_measured() -> None:
    def row(throughput: float, rtt: float) -> bench_figures.Row:
        return {"throughput": throughput, "throughput_ratio": throughput / 100, "rtt_ms_p50": rtt}

    rows = {"http_64": {"unprotected": row(100, 1), "fixed": row(50, 20), "adaptive": row(90, 5) | {"wire_ratio": 0.5}},
            "echo_32": {"unprotected": row(100, 1), "fixed": row(60, 4), "adaptive": row(54, 5)},
            "download": {"fixed": row(10, 0) | {"rtt_ms_p50": None}, "adaptive": row(8, 0) | {"rtt_ms_p50": None}},
            "memory_all": {"fixed": row(10, 0), "adaptive": row(1, 0)}}
    found = {goal.what: goal for goal in bench_figures.goals(rows, {"over_floor": 1.2})}
    assert found["http_64: of unprotected"].is_met is True
    assert found["http_64: of the raw pages on the wire"].is_met is False
    assert found["redis_64: of unprotected"].is_met is None
    assert found["throughput over that of fixed, the worst workload"].found == 0.8, "the bulk, too, and no memory"
    assert found["median round trip over that of fixed, the worst workload"].found == 1.25
    assert found["throughput over that of event, the worst workload"].found is None
    assert found["pause with 100 pages over QEMU's own"].is_met is True
    lines = bench_figures.goal_table(list(found.values())).splitlines()
    assert len(lines) == len(found) and lines[0].endswith("0.90  >= 0.85  met") and lines[2].endswith("NOT met")


def line(at: float, count: int) -> str:
    return json.dumps({"at": at, "count": count, "pause_ms": [at] * count, "pages": [7] * count,
                       "epoch_ms": [20.0] * count, "wire_bytes": [30] * count, "state_bytes": [1] * count,
                       **{f"{stage}_ms": [2.5] * count for stage in bench_figures.STAGES}}) + "\n"


def test_checkpoints_of_other_times_are_left_out() -> None:
    text = line(10.0, 1) + line(11.0, 2) + line(12.0, 3) + line(13.0, 4)
    found = bench_figures.epochs_between(text, 10.5, 12.5)
    assert found.pause_ms == [12.0] * 3
    assert found.stages_ms["ack"] == [2.5] * 3


def test_a_line_after_a_silence_tells_of_its_own_time_only() -> None:
    """An idle guest's engine writes seldom; its line is not as long as the silence before it."""
    text = line(10.0, 1) + line(30.0, 2)
    assert bench_figures.epochs_between(text, 25.0, 31.0).pages == [7, 7]


def test_a_line_that_is_being_written_is_left_out() -> None:
    assert bench_figures.epochs_between(line(11.0, 1) + '{"at": 12.0, "pau', 9.0, 13.0).pages == [7]


BEFORE = Snapshot(100.0, {"guest": 5.0, "engine": 1.0}, {"guest": 200.0}, 1000)
AFTER = Snapshot(110.0, {"guest": 14.0, "engine": 1.3, "new": 3.0}, {"guest": 201.04}, 1000 + 4096 * 100)
EPOCHS = Epochs([1.0, 3.0], [10, 10], [100.0, 100.0], [4096, 4096], {"stop": [0.5, 0.7]})
PLAIN = bench_figures.row(Outcome(200.0, "r/s", 1.0, 2.0, [1.0, 2.0]), BEFORE, AFTER, None)


def against(outcome: Outcome, epochs: Epochs = EPOCHS) -> bench_figures.Row:
    """Once, compared with the unprotected guest."""
    measured = bench_figures.row(outcome, BEFORE, AFTER, epochs)
    return bench_figures.compared({"unprotected": [PLAIN], "adaptive": [measured]})["adaptive"]


def test_the_unprotected_guest_is_what_others_are_compared_with() -> None:
    found = bench_figures.compared({"unprotected": [PLAIN]})["unprotected"]
    assert found["throughput_ratio"] == 1.0
    assert "pause_ms_p50" not in found and "rtt_added_ms_p50" not in found


def test_a_policy_is_shown_as_a_ratio_and_as_an_added_round_trip() -> None:
    found = against(Outcome(150.0, "r/s", 4.0, 9.0))
    assert (found["throughput_ratio"], found["rtt_added_ms_p50"]) == (0.75, 3.0)
    assert found["cores"] == {"guest": 0.9, "engine": 0.03}
    assert (found["checkpoints"], found["pause_ms_p50"], found["pause_share"]) == (2, 3.0, 0.02)


def test_the_wire_is_compared_with_the_raw_pages() -> None:
    """And all that the link carried, of whatever, is a rate of its own."""
    found = against(Outcome(150.0, "r/s"))
    assert (found["wire_ratio"], found["wire_bytes_p50"]) == (0.1, 4096)
    assert found["link_mib_s"] == 0.039
    assert found["stages_ms_p50"] == {"stop": 0.7}


def test_without_checkpoints_there_is_no_ratio() -> None:
    found = against(Outcome(150.0, "r/s"), Epochs())
    assert found["wire_ratio"] is None and found["checkpoints"] == 0


def test_what_was_measured_twice_is_one_and_compared_with_both_times_of_the_unprotected_guest() -> None:
    later = bench_figures.row(Outcome(100.0, "r/s", 3.0, 4.0, [3.0, 4.0]), BEFORE, AFTER, None)
    times = [bench_figures.row(Outcome(rate, "r/s", 4.0, rtt, [], 1), BEFORE, AFTER, EPOCHS)
             for rate, rtt in ((80.0, 9.0), (70.0, 11.0))]
    found = bench_figures.compared({"unprotected": [PLAIN, later], "adaptive": times})
    adaptive = found["adaptive"]
    assert (adaptive["throughput_ratio"], adaptive["rtt_added_ms_p50"], adaptive["rtt_ms_p99"]) == (0.5, 2.0, 10.0)
    assert (adaptive["errors"], adaptive["checkpoints"], len(adaptive["samples"])) == (2, 4, 4)
    assert adaptive["cores"]["guest"] == 0.9 and adaptive["stages_ms_p50"] == {"stop": 0.7}
    assert found["unprotected"]["curve_ms"] == [2.0, 3.0]
    assert times[0]["throughput"] == 80.0, "what was measured stays"


def test_the_line_through_the_pauses_is_not_tilted_by_a_few_long_ones() -> None:
    points = [(float(pages), 2.0 + 0.004 * pages) for pages in range(0, 1000, 10)]
    spoilt = [(pages, pause + (50.0 if pages % 200 == 0 else 0.0)) for pages, pause in points]
    found = bench_figures.line(spoilt)
    assert found is not None
    assert found == pytest.approx((2.0, 0.004), rel=0.05)


def test_one_place_makes_no_line() -> None:
    assert bench_figures.line([(3.0, 1.0), (3.0, 2.0)]) is None


def rows() -> bench_figures.Rows:
    protected = bench_figures.row(Outcome(150.0, "r/s", 4.0, 9.0, [3.0, 4.0]), BEFORE, AFTER, EPOCHS)
    return {"echo_1": bench_figures.compared({"unprotected": [PLAIN], "adaptive": [protected]}),
            "idle": bench_figures.compared({"unprotected": [PLAIN]})}


def test_the_table_has_a_line_for_each_policy_of_each_workload() -> None:
    lines = bench_figures.table(rows()).splitlines()
    assert [text.split()[:2] for text in lines[1:]] == [
        ["echo_1", "unprotected"], ["echo_1", "adaptive"], ["idle", "unprotected"]]
    assert "0.75" in lines[2] and " - " in lines[1]


def test_drift_is_what_the_unprotected_guest_does_at_the_end() -> None:
    last = PLAIN | {"throughput": 190.0}
    assert bench_figures.drift({"echo_1": {"unprotected": [PLAIN, last]}, "once": {"unprotected": [PLAIN]},
                                "failed": {}}) == {"echo_1": 0.95}


def test_the_pictures_are_drawn_from_what_there_is(tmp_path: Path) -> None:
    files = bench_plots.draw(rows(), bench_figures.pause_fit(rows()), tmp_path, "bench")
    assert [one.name for one in files] == ["bench-latency.png", "bench-throughput.png", "bench-pause.png"]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in files)
    assert bench_plots.draw({}, None, tmp_path, "empty") == []


def test_the_bytes_that_went_are_told_from_those_that_came() -> None:
    text = ("Inter-|   Receive                                                |  Transmit\n"
            "    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n"
            "eth-data: 1000 2 3 4 5 6 7 8 2000 10 11 12 13 14 15 16\n")
    assert bench_probes.sent_bytes(text, "eth-data") == 2000
    with pytest.raises(LabError):
        bench_probes.sent_bytes(text, "eth-prov")


def test_processor_time_is_read_from_a_process_with_any_name() -> None:
    assert bench_probes.cpu_s("7 (a b) c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 9 9 20 0 1 0 5") == 2.0


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """An echo that gives back in pieces."""
    def serve(end: socket.socket) -> None:
        with end, suppress(OSError):
            while got := end.recv(1 << 16):
                for half in (got[: len(got) // 2], got[len(got) // 2:]):
                    end.sendall(half)

    def accept() -> None:
        while True:
            try:
                end, _ = door.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(end,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=accept, daemon=True).start()
        yield door.getsockname()[:2]


def test_a_round_trip_ends_with_the_whole_message(echo: tuple[str, int]) -> None:
    found = bench_client.echo(echo, 3, 5000, 0.3)
    assert found.requests > 0
    assert len(found.curve_ms) == bench_client.CURVE
    assert found.curve_ms == sorted(found.curve_ms)
    assert found.curve_ms[0] <= found.rtt_ms_p50 <= found.rtt_ms_p99 <= found.curve_ms[-1]


def test_no_reply_makes_an_empty_report() -> None:
    assert bench_client.summarize([], 1.0).requests == 0


def test_an_order_that_the_guest_does_not_know_is_an_error() -> None:
    def serve() -> None:
        end, _ = door.accept()
        with end:
            end.recv(100)
            end.sendall(b"unknown\n")

    with socket.create_server(("127.0.0.1", 0)) as door:
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(ValueError, match="unknown"):
            bench_client.order(door.getsockname()[:2], "fly", 10.0)
