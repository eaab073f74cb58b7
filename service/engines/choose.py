"""Which engine runs a model on this machine, and why."""

import importlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from service.classifier import Classifier
from service.engines.base import Engine, EngineUnavailable
from service.engines.names import NAMES, EngineName, Wanted
from service.logs import counted
from service.model.artifact import Artifact
from service.model.errors import ArtifactDamaged, ArtifactError
from service.model.machine import SAGEMAKER_MODEL, cores, gpus, has_gpu
from service.model.manifest import Manifest

log = logging.getLogger(__name__)

MODULES: dict[EngineName, str] = {"torch": "eager", "torch-cuda": "cuda"}
"""Of the engines that are not OpenVINO's."""


@dataclass(frozen=True)
class Layout:
    """What the engine gets of the machine."""

    threads: int
    """Of an engine on the CPU, for its lanes together."""
    alone_threads: int = 0
    """Of an engine on the CPU, for an image that comes alone; 0: as many as `threads`."""
    device: int = 0
    """Number of the GPU."""
    max_batch: int = 32
    """Images the engine will get at once, at most."""
    settles: bool = False
    """Whether the caller will call `Engine.settle` itself, when its clients have answers."""

    @classmethod
    def default(cls) -> "Layout":
        """All cores this process may use."""
        return cls(cores())


def load(artifact: Artifact, wanted: Wanted = "auto", layout: Layout | None = None) -> Classifier:
    """A classifier whose engine gave the stored logits: `wanted`, or the fastest that does.

    Raises: ArtifactError, EngineUnavailable.
    """
    layout = layout or Layout.default()
    check = artifact.self_check()
    if wanted != "auto":
        classifier = Classifier.of(artifact, create(artifact, wanted, layout))
        _log_choice(wanted, layout, "it was asked for", classifier.check(check))
        return classifier
    failure: ArtifactError | EngineUnavailable
    failure = EngineUnavailable(
        "Neither OpenVINO nor torch is installed: 'pip install openvino' makes the service run."
    )
    for name, reason in candidates(artifact.manifest):
        try:
            classifier = Classifier.of(artifact, create(artifact, name, layout))
            difference = classifier.check(check)
        except ArtifactDamaged:
            raise
        except (ArtifactError, EngineUnavailable) as exc:
            expected = isinstance(exc, EngineUnavailable) and name != "torch-cuda"
            level = logging.INFO if expected else logging.WARNING
            log.log(level, "engine %s is passed over: %s", name, exc)
            failure = exc
            continue
        _log_choice(name, layout, reason, difference)
        return classifier
    raise failure


def candidates(manifest: Manifest) -> Iterator[tuple[EngineName, str]]:
    """What `auto` tries, the fastest first, each with the reason."""
    if gpus():
        yield "torch-cuda", f"there is a GPU ({gpus()} seen)"
        if SAGEMAKER_MODEL.is_dir():
            return  # a GPU that is paid for by the hour and cannot be used is an error, no reason to run on the CPU
    if importlib.util.find_spec("openvino") is not None:
        int8 = manifest.quantization
        if int8 is None:
            why = "the artifact has no int8 network"
        else:
            why = (
                f"int8 agrees with float32 on {int8.top1_agreement:.2%} of {int8.n:,} validation images and "
                f"{'gains' if int8.loss_points < 0 else 'loses'} {abs(int8.loss_points):.2f} points of accuracy"
            )
            if int8.doubt is None:
                yield "openvino-int8", why
            else:
                why += f"; {int8.doubt}"
        yield "openvino-bf16", why
        yield "openvino-fp32", why
    if importlib.util.find_spec("torch") is not None:
        yield "torch", "OpenVINO cannot run it"


def create(artifact: Artifact, name: EngineName, layout: Layout) -> Engine:
    """The engine of that name. Raises: ArtifactError, EngineUnavailable."""
    engine = _made(artifact, name, layout)
    if not layout.settles:
        engine.settle()
    return engine


def _made(artifact: Artifact, name: EngineName, layout: Layout) -> Engine:
    if name == "torch-cuda" and not has_gpu():  # before torch is imported
        raise EngineUnavailable(
            "There is no NVIDIA GPU here: CLASSIFIER_ENGINE=auto takes the processor; a container is given a GPU by "
            "'docker run --gpus all'."
        )
    _import(name)
    if name == "torch":
        from service.engines.eager import EagerEngine  # torch takes seconds to import: only where it runs

        return EagerEngine(artifact, layout.threads)
    if name == "torch-cuda":
        from service.engines.cuda import CudaEngine

        return CudaEngine(artifact, layout.device, layout.max_batch)
    from service.engines.openvino import OpenVinoEngine

    precisions: dict[str, Literal["fp32", "bf16", "int8"]]
    precisions = {"openvino-fp32": "fp32", "openvino-bf16": "bf16", "openvino-int8": "int8"}
    return OpenVinoEngine(artifact, precisions[name], layout.threads, layout.alone_threads or layout.threads)


def _import(name: EngineName) -> None:
    """What it is made of. Raises: EngineUnavailable, whatever its libraries raise where they are broken."""
    try:
        importlib.import_module(f"service.engines.{MODULES.get(name, 'openvino')}")
    except Exception as exc:
        said = " ".join(str(exc).split())[:300] or type(exc).__name__
        raise EngineUnavailable(
            f"The engine {name} needs a package that cannot be imported ({said}); choose another of "
            f"{', '.join(['auto', *_installed()])}."
        ) from exc


def _installed() -> list[EngineName]:
    """The engines whose package is there."""
    packages = {name: "openvino" if name.startswith("openvino") else "torch" for name in NAMES}
    return [name for name in NAMES if _is_installed(packages[name])]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # blocked in sys.modules
        return False


def _log_choice(name: EngineName, layout: Layout, reason: str, difference: float) -> None:
    where = f"GPU {layout.device}" if name == "torch-cuda" else counted(layout.threads, "thread")
    log.info("engine %s on %s: %s; self-check within %.2g of the largest logit", name, where, reason, difference)
