"""The playground's server: who may ask, what may be asked, one job at a time, samples as the command makes them."""

import http.client
import io
import json
import threading
import time
from base64 import b64decode

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from metaflowmaps import cli
from metaflowmaps.errors import InputError
from metaflowmaps.flow_map import MetaFlowMap
from metaflowmaps.lab.opened import OpenedModel
from metaflowmaps.lab.play.asked import AskedPictures, AskedPosterior
from metaflowmaps.lab.play.playground import Playground
from metaflowmaps.lab.play.server import MAX_REQUEST_BYTES, PlayServer
from metaflowmaps.networks import MLPConfig
from metaflowmaps.path import LinearPath

STEERING = {
    "reward": 1,
    "method": "mfm-gf",
    "options": {"num_draws": 2},
    "steps": 3,
    "num": 4,
    "seed": 5,
    "strength": 2.0,
}
INK = "def ink(x):\n    return x.flatten(1).mean(1)\n\ndef broken(x):\n    raise ValueError('no\\nsuch thing')\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "mine.py"
    file.write_text(INK)
    playground = Playground(OpenedModel.open("digits", "cpu"), (f"{file}:broken", f"{file}:ink"))
    with PlayServer(playground) as started:
        thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield started
        playground.close()
        started.shutdown()
        thread.join()


def request(server, method, path, body=b"", **headers):
    """(status, headers, bytes)"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path, body, {"Host": f"127.0.0.1:{server.server_port}", **headers})
    answer = connection.getresponse()
    held = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return held


def ask(server, question, asked=None, **headers):
    status, _, body = request(
        server,
        "POST",
        f"/{question}",
        json.dumps(asked or {}).encode(),
        **{"Content-Type": "application/json"} | headers,
    )
    return status, json.loads(body)


def finished(server):
    for _ in range(2000):
        answer = ask(server, "progress")[1]
        if not answer["running"]:
            return answer
        time.sleep(0.01)
    raise AssertionError("the job does not end")


def test_the_page_comes_whole_and_may_load_nothing_from_elsewhere(server):
    status, headers, page = request(server, "GET", "/")
    assert status == 200
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Cache-Control"] == "no-store"
    assert b"default-src 'none'" in page
    assert b"http://" not in page
    assert ask(server, "about")[1]["shape"] == [1, 8, 8]


@pytest.mark.parametrize(
    "host", ["evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "", "localhost:{port}@evil.example", "[::1", "a b"]
)
def test_another_name_is_refused(server, host):
    """A name that was made to mean this machine (DNS rebinding) is not this server's."""
    status, _, body = request(server, "GET", "/", Host=host.format(port=server.server_port))
    assert status == 403
    assert server.url in json.loads(body)["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_is_refused(server, headers):
    headers = {name: value.format(port=server.server_port) for name, value in headers.items()}
    assert ask(server, "about", **headers)[0] == 403


def test_its_own_page_and_localhost_are_served(server):
    own = {"Host": f"localhost:{server.server_port}", "Origin": f"http://localhost:{server.server_port}"}
    assert ask(server, "about", **own, **{"Sec-Fetch-Site": "same-origin"})[0] == 200


@pytest.mark.parametrize(
    ("question", "asked", "says"),
    [
        ("posterior", {"t": 2}, "t"),
        ("posterior", {"pixels": [0] * 63}, "8 × 8 × 1"),
        ("posterior", {"pixels": [256] * 64}, "pixels"),
        ("posterior", {"picture": "-1"}, "picture"),
        ("posterior", {"picture": "9" * 19}, "2**63"),
        ("posterior", {"picture": "1", "draws": 33}, "draws"),
        ("posterior", {"picture": "1", "label": "cat"}, "class"),
        ("steer", {**STEERING, "method": "exact"}, "exact"),
        ("steer", {**STEERING, "method": "/etc/passwd:x"}, "method"),
        ("steer", {**STEERING, "reward": 99}, "--reward"),
        ("steer", {**STEERING, "options": {"num_draws": 65}}, "num_draws"),
        ("steer", {**STEERING, "options": {"chunk": 1}}, "chunk"),
        ("steer", {**STEERING, "strength": -1}, "strength"),
        ("steer", {**STEERING, "num": 65}, "num"),
        ("steer", {**STEERING, "path": "x"}, "path"),
        ("steer", {**STEERING, "reward": 2, "words": "12"}, "margin"),
        ("about", [1], "Config"),
    ],
)
def test_what_is_out_of_bounds_is_one_line(server, question, asked, says):
    status, answer = ask(server, question, asked)
    assert status == 400
    assert says in answer["error"]
    assert "\n" not in answer["error"]


def test_requests_are_bounded_json_and_their_routes_known(server):
    port = f"127.0.0.1:{server.server_port}"
    kind = {"Content-Type": "application/json"}
    assert request(server, "POST", "/about", b"{}")[0] == 415  # what a form of another site could send
    assert request(server, "POST", "/about", b"{", **kind)[0] == 400
    assert request(server, "POST", "/about", b"[" * 100_000, **kind)[0] == 400
    assert request(server, "GET", "/../../etc/passwd")[0] == 404
    assert request(server, "POST", "/nothing", b"{}", **kind)[0] == 404
    assert request(server, "PUT", "/about", b"{}", **kind)[0] == 501
    for length, status in ((str(MAX_REQUEST_BYTES + 1), 413), ("9" * 40, 413), ("-1", 411), ("²", 411)):
        connection = http.client.HTTPConnection(port, timeout=20)
        connection.putrequest("POST", "/about", skip_host=True)
        for name, value in {"Host": port, **kind, "Content-Length": length}.items():
            connection.putheader(name, value.encode())
        connection.endheaders()
        assert connection.getresponse().status == status
        connection.close()


def test_draws_are_the_maps_own_and_repeat(server):
    pictures = ask(server, "pictures", {"seed": 1})[1]
    asked = {"picture": pictures["seeds"][0], "t": 1.0, "draws": 3, "noise": 7}
    status, told = ask(server, "posterior", asked)
    assert status == 200
    assert told["clean"] == pictures["pictures"][0]
    assert set(told["draws"]) == {told["noisy"]} == {told["clean"]}  # exact at t = 1
    assert told["evaluations"] == 3
    early = [ask(server, "posterior", {**asked, "t": 0.3})[1]["draws"] for _ in range(2)]
    assert early[0] == early[1]
    assert len(set(early[0])) == 3
    drawn = ask(server, "posterior", {"pixels": [255] * 64, "t": 1.0})[1]
    assert len(set(drawn["draws"])) == 1


def test_steered_samples_are_saved_with_rewards_and_seeds(server):
    assert ask(server, "steer", STEERING) == (200, {"started": True})
    told = finished(server)
    assert (told["error"], told["stopped"], told["done"], len(told["pictures"])) == ("", False, 3, 4)
    status, headers, body = request(server, "GET", "/samples.safetensors")
    assert (status, headers["Content-Disposition"]) == (200, 'attachment; filename="samples.safetensors"')
    saved = load(body)
    assert told["seeds"] == list(map(str, saved["seeds"].tolist()))
    assert told["rewards"] == pytest.approx(saved["rewards"].tolist())
    torch.testing.assert_close(saved["rewards"], 2 * saved["samples"].flatten(1).mean(1))


@pytest.mark.attack  # a figure is drawn
def test_the_command_that_is_told_makes_the_same_samples(server, tmp_path, monkeypatch, capsys):
    ask(server, "steer", STEERING)
    told, saved = finished(server), load(request(server, "GET", "/samples.safetensors")[2])
    monkeypatch.setattr("sys.argv", [*told["command"].split(), "--out", str(tmp_path / "out"), "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    made = load((tmp_path / "out" / "samples.safetensors").read_bytes())
    torch.testing.assert_close(made["samples"], saved["samples"], atol=1e-5, rtol=0)  # threads differ: rounding


def test_one_job_at_a_time_which_stops_when_told(server):
    assert ask(server, "steer", {**STEERING, "steps": 250, "num": 64})[0] == 200
    assert ask(server, "steer", STEERING)[0] == 409
    status, answer = ask(server, "posterior", {"picture": "1"})
    assert (status, "stop it" in answer["error"]) == (409, True)
    ask(server, "stop")
    told = finished(server)
    assert (told["stopped"], told["error"]) == (True, "")
    assert told["done"] < 250
    assert ask(server, "posterior", {"picture": "1"})[0] == 200


def test_a_reward_that_breaks_is_one_line_and_the_next_job_runs(server):
    ask(server, "steer", {**STEERING, "reward": 0})
    assert "no such thing" in " ".join(finished(server)["error"].split())
    ask(server, "steer", STEERING)
    assert finished(server)["error"] == ""


def test_a_port_in_use_and_a_map_without_pixels_are_one_line(server, tmp_path):
    with pytest.raises(InputError, match=f"port {server.server_port} .*give another --port, 0 for any"):
        PlayServer(server.playground, port=server.server_port)
    opened = server.playground.opened
    with pytest.raises(InputError, match="mfm play digits"):
        Playground(Vectors(opened))


def test_colours_classes_and_sides_that_differ_are_no_matter(tmp_path):
    config = MLPConfig(width=8, depth=1, num_classes=3)
    MetaFlowMap(config.network((3, 6, 4)), LinearPath()).save_pretrained(tmp_path / "map")
    play = Playground(OpenedModel.open(str(tmp_path / "map"), "cpu"))
    about = play.about()
    assert (about["shape"], about["classes"], about["rewards"]) == ((3, 6, 4), ("0", "1", "2"), [])
    red = (255, 0, 0) * 24
    told = play.posterior(AskedPosterior(pixels=red, t=1.0, label="2", draws=2))
    with Image.open(io.BytesIO(b64decode(told["clean"].partition(",")[2]))) as picture:
        assert (picture.size, picture.mode, picture.getpixel((3, 5))) == ((4, 6), "RGB", (255, 0, 0))
    assert told["draws"] == [told["clean"]] * 2
    assert len(set(play.pictures(AskedPictures(label="1"))["pictures"])) == 12
    with pytest.raises(InputError, match="class"):
        play.posterior(AskedPosterior(pixels=red, label="3"))


class Vectors:
    """A map of points in the plane."""

    def __init__(self, opened):
        self.name, self.latent = "plane", False
        self.model = type("Model", (), {"event_shape": (2,)})()


def test_the_command_says_where_it_is_and_ends_cleanly_at_ctrl_c(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PlayServer, "serve_forever", interrupted)
    monkeypatch.setattr("sys.argv", ["mfm", "play", "--port", "0"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (0, "")
    assert err.startswith("digits: open http://127.0.0.1:")
    assert err.endswith("stopped\n")
