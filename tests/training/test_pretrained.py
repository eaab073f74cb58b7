"""Pretrained weights: from files and from torchvision's address, verified, never executed, refused in words."""

import contextlib
import gc
import hashlib
import os
import pickle
import socket
import socketserver
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import ResNet34_Weights, resnet34
from torchvision.models._api import Weights

from service.model.architecture import Architecture
from service.model.network import Network
from service.model.preprocess import Preprocessing
from training.errors import WeightsError
from training.pretrained import IMAGENET, cached_imagenet, imagenet_state, load_pretrained

State = dict[str, Tensor]


@contextlib.contextmanager
def running(server: socketserver.TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def file_server(folder: Path) -> socketserver.TCPServer:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))


def server_that_answers(answer: bytes) -> socketserver.TCPServer:
    """Answers every request with these bytes and hangs up."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(answer)

    return socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MakesFolder:
    """What it is pickled into makes a folder when it is loaded: the harmless form of running a program."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def weights_at(url: str) -> Weights:
    return Weights(url=url, transforms=torch.nn.Identity, meta={})


def backbone(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def state() -> State:
    """A ResNet-34 of torchvision's, its statistics as if it had been trained."""
    torch.manual_seed(1)
    model = resnet34()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
    return model.state_dict()


@pytest.fixture(scope="module")
def pth(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pth") / "weights.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network() -> Network:
    """One for all tests, which either refuse to change it or replace its whole backbone."""
    return Network(Architecture(num_classes=2, hidden_units=4), Preprocessing(side_px=32))


@pytest.fixture
def torch_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


def reset(network: Network) -> None:
    """Fill the network with numbers that are in no file."""
    for tensor in network.state_dict().values():
        tensor.fill_(3)


def untouched(state: State) -> bool:
    return all(bool((tensor == 3).all()) for tensor in state.values())


def constant(state: State, value: float) -> dict[Any, Any]:
    """Names and shapes of `state` in a small file: all numbers are one and the same."""
    return {name: torch.tensor(value).expand(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("ending", [".pth", ".pt", ".safetensors"])
def test_a_file_gives_its_backbone_and_leaves_the_head(
    network: Network, state: State, pth: Path, tmp_path: Path, ending: str
) -> None:
    path = tmp_path / f"mine{ending}"
    if ending == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        path.hardlink_to(pth)
    reset(network)
    assert load_pretrained(network, str(path)) == path.name
    after = network.state_dict()
    assert equal(backbone(after), backbone(state))
    assert untouched({name: tensor for name, tensor in after.items() if name.startswith("fc.")})


def test_a_files_class_layer_may_have_any_shape_or_be_missing(network: Network, state: State, tmp_path: Path) -> None:
    given = constant(backbone(state), 2)
    for head in ({}, {"fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}):
        torch.save({**given, **head}, tmp_path / "mine.pth")
        reset(network)
        load_pretrained(network, str(tmp_path / "mine.pth"))
        assert all(bool((tensor == 2).all()) for tensor in backbone(network.state_dict()).values())


def test_statistics_may_lack_their_counters_as_old_files_do(network: Network, state: State, tmp_path: Path) -> None:
    old = {name: tensor for name, tensor in constant(state, 2).items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth")
    assert load_pretrained(network, str(tmp_path / "old.pth")) == "old.pth"


def test_the_weights_of_an_artifact_can_be_trained_further(network: Network, artifact: Path) -> None:
    (path,) = artifact.glob("weights.*")
    reset(network)
    assert load_pretrained(network, str(path)) == path.name
    assert equal(backbone(network.state_dict()), backbone(safetensors.torch.load_file(path)))


def test_a_folder_with_one_file_is_a_channel(network: Network, pth: Path, tmp_path: Path) -> None:
    (tmp_path / "README.txt").touch()
    (tmp_path / "w.pth").hardlink_to(pth)
    assert load_pretrained(network, str(tmp_path)) == "w.pth"


@pytest.mark.parametrize("count", [0, 2])
def test_a_folder_with_no_or_several_files_is_refused(network: Network, tmp_path: Path, count: int) -> None:
    for i in range(count):
        (tmp_path / f"{i}.pth").touch()
    with pytest.raises(WeightsError, match=f"holds {count} weights files .*it must hold one"):
        load_pretrained(network, str(tmp_path))


def test_none_leaves_the_network_as_it_is(network: Network) -> None:
    reset(network)
    assert load_pretrained(network, "none") == "none"
    assert untouched(network.state_dict())


def test_a_file_that_is_not_there_is_refused_with_what_may_be_given(network: Network) -> None:
    with pytest.raises(WeightsError, match="--weights image-net: there is no such file; give imagenet, none, or a"):
        load_pretrained(network, "image-net")


def without_first_layer(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name != "conv1.weight"}


def with_wide_first_layer(state: State) -> State:
    return {**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}


def with_fourth_block(state: State) -> State:
    return {**state, "layer1.3.conv1.weight": torch.zeros(1)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_first_layer, r"it lacks conv1\.weight \(1 in all\)"),
        (with_wide_first_layer, r"has other shapes for conv1\.weight \(1 in all\)"),
        (with_fourth_block, r"has unknown layer1\.3\.conv1\.weight \(1 in all\)"),
        (lambda _: {}, r"it lacks .* \(180 in all\)"),
        (lambda _: {0: torch.zeros(1)}, r"w\.pth"),
        (lambda _: {"epoch": 3, "state_dict": {}}, "is not a state dict"),
        (lambda _: [torch.zeros(1)], "is not a state dict"),
    ],
    ids=["a key missing", "another shape", "a key too many", "empty", "numbered", "a checkpoint", "a list"],
)
def test_weights_that_do_not_fit_are_refused_and_the_network_stays_as_it_was(
    network: Network, state: State, tmp_path: Path, change: Any, reason: str
) -> None:
    torch.save(change(constant(state, 2)), tmp_path / "w.pth")
    reset(network)
    with pytest.raises(WeightsError, match=reason):
        load_pretrained(network, str(tmp_path / "w.pth"))
    assert untouched(network.state_dict())


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain pickle", "torch.save"])
def test_a_file_that_would_run_a_program_is_refused_and_nothing_runs(
    network: Network, tmp_path: Path, wrapped: bool
) -> None:
    trap = {"conv1.weight": MakesFolder(tmp_path / "it ran")}
    path = tmp_path / "w.pth"
    if wrapped:
        torch.save(trap, path)
    else:
        path.write_bytes(pickle.dumps(trap))
    with pytest.raises(WeightsError, match=r"w\.pth cannot be read as weights \(.*\); give a state dict") as refused:
        load_pretrained(network, str(path))
    assert not (tmp_path / "it ran").exists()
    assert "`weights_only` set to `False`" not in str(refused.value)  # torch's advice would run it


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"junk" * 10, b"PK\x03\x04" + bytes(100)], ids=["empty", "junk", "zip"])
def test_a_file_that_is_no_such_file_is_refused_naming_it(
    network: Network, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name} cannot be read as weights"):
        load_pretrained(network, str(tmp_path / name))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_truncated_file_is_refused_naming_it(network: Network, pth: Path, tmp_path: Path, name: str) -> None:
    content = pth.read_bytes() if name == "w.pth" else safetensors.torch.save({"conv1.weight": torch.zeros(500)})
    (tmp_path / name).write_bytes(content[:1000])
    with pytest.raises(WeightsError, match=f"{name} cannot be read as weights"):
        load_pretrained(network, str(tmp_path / name))


def test_the_imagenet_weights_are_torchvisions_and_their_name_carries_the_hash() -> None:
    assert (
        IMAGENET.url
        == ResNet34_Weights.IMAGENET1K_V1.url
        == "https://download.pytorch.org/models/resnet34-b627a593.pth"
    )


def test_imagenet_weights_are_downloaded_once_verified_and_loaded(
    network: Network, state: State, pth: Path, tmp_path: Path, torch_home: Path
) -> None:
    name = f"resnet34-{hashlib.sha256(pth.read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / name).hardlink_to(pth)
    with running(file_server(tmp_path / "published")) as address:
        imagenet = weights_at(f"{address}/{name}")
        reset(network)
        assert load_pretrained(network, "imagenet", imagenet) == imagenet.url
    assert equal(backbone(network.state_dict()), backbone(state))
    assert cached_imagenet(imagenet) == torch_home / "hub" / "checkpoints" / name
    assert equal(imagenet_state(imagenet), state)  # there is no server any more, and none is needed
    assert socket.getdefaulttimeout() is None
    with cached_imagenet(imagenet).open("r+b") as file:  # from here on the cached file is another
        file.seek(1_000_000)
        file.write(b"tampered")
    with pytest.raises(WeightsError, match=rf"{name} is damaged or another file: .* delete it"):
        imagenet_state(imagenet)


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path: Path, torch_home: Path) -> None:
    (tmp_path / "resnet34-00000000.pth").write_bytes(b"something else")
    with running(file_server(tmp_path)) as address:
        imagenet = weights_at(f"{address}/resnet34-00000000.pth")
        with pytest.raises(WeightsError, match=r"cannot be downloaded \(invalid hash value"):
            imagenet_state(imagenet)
    assert list((torch_home / "hub" / "checkpoints").iterdir()) == []


def test_a_cached_file_that_would_run_a_program_is_refused_and_nothing_runs(tmp_path: Path, torch_home: Path) -> None:
    imagenet = weights_at("http://127.0.0.1:1/resnet34-b627a593.pth")
    path = cached_imagenet(imagenet)
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(MakesFolder(tmp_path / "it ran")))
    with pytest.raises(WeightsError, match="is damaged or another file"):
        imagenet_state(imagenet)
    assert not (tmp_path / "it ran").exists()


def test_an_address_without_a_hash_cannot_be_verified_and_is_refused(tmp_path: Path, torch_home: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"anything")
    with running(file_server(tmp_path)) as address:
        imagenet = weights_at(f"{address}/weights.pth")
        with pytest.raises(WeightsError, match="has no hash in its name"):
            imagenet_state(imagenet)


def assert_says_what_to_do(message: str, imagenet: Weights, torch_home: Path) -> None:
    assert message.startswith("The ImageNet weights cannot be downloaded (")
    place = torch_home / "hub" / "checkpoints" / "resnet34-b627a593.pth"
    assert f"Fetch {imagenet.url} on a machine that has network and put it at {place}, " in message
    assert "--weights none trains everything from random weights" in message


def test_an_address_that_cannot_be_reached_says_what_to_fetch_by_hand(torch_home: Path) -> None:
    imagenet = weights_at(f"http://127.0.0.1:{closed_port()}/resnet34-b627a593.pth")
    with pytest.raises(WeightsError) as refused:
        imagenet_state(imagenet)
    assert_says_what_to_do(str(refused.value), imagenet, torch_home)
    assert socket.getdefaulttimeout() is None


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1000\r\nhalf",
        b"this is not HTTP\r\n\r\n",
        b"",
    ],
    ids=["not found", "cut short", "cut short in chunks", "not HTTP", "hangs up"],
)
def test_a_server_that_misbehaves_says_what_to_fetch_by_hand(torch_home: Path, answer: bytes) -> None:
    with running(server_that_answers(answer)) as address:
        imagenet = weights_at(f"{address}/resnet34-b627a593.pth")
        try:
            imagenet_state(imagenet)
        except WeightsError as exc:
            assert_says_what_to_do(str(exc), imagenet, torch_home)
        else:
            raise AssertionError("nothing was refused")
    gc.collect()  # urllib leaves the socket to it
    assert list((torch_home / "hub" / "checkpoints").iterdir()) == []
