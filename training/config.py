"""A training run's settings: one frozen model whose fields are the hyperparameters.

Defaults < recipe < tuning's best < SageMaker's hyperparameters < command line (see `training.flags`).
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from service.model.architecture import BLOCKS, MAX_HIDDEN_UNITS, Block
from training.data.folder import BrokenFiles
from training.errors import ConfigError
from training.flags import Settings

RECIPES = Path(__file__).parent / "recipes"
FILES = {
    "recipe": f"settings to start from: {', '.join(sorted(p.stem for p in RECIPES.glob('*.toml')))}, or a TOML file",
    "from_tuning": "best.json of a tuning (training.hpo), whose settings to take",
}
"""Options that name files of settings; SageMaker's hyperparameters may be called so too."""

LOCAL = frozenset(
    {
        "data", "validation", "output", "run_folder", "checkpoints", "checkpoint_every_s", "cache_folder", "device",
        "loader_workers", "model_name", "report", "quantize",
    }
)  # fmt: skip
"""Settings that say where and under which name a run happens and what it leaves besides, not what it learns."""

Quantize = Literal["auto", "on", "off"]

REFERENCE_FROZEN: tuple[Block, ...] = ("stem", "layer1", "layer2", "layer3")
"""What the reference freezes: residual blocks 1 to 3, stem included."""


class TrainingConfig(Settings):
    """What a run does. The defaults are the reference recipe, whose published result is 40.71 % validation accuracy."""

    OTHERS: ClassVar[tuple[str, ...]] = tuple(FILES)

    data: Path = Field(description="folder with cifar-100-python/, or with one folder of images per class")
    validation: Path | None = Field(
        None, description="folder of class folders to validate on; default: what lies in --data, or a split by seed"
    )
    output: Path = Field(description="folder to write the artifact into; one that is there is replaced at the end")
    weights: str = Field("imagenet", description="pretrained weights: imagenet, none, or a .pth or .safetensors file")
    freeze: tuple[Block, ...] | None = Field(
        None,
        description=f"blocks that are not trained, comma-separated, of {', '.join(BLOCKS)}; or none; default: "
        f"{','.join(REFERENCE_FROZEN)}, but none with --weights none",
    )
    learning_rate: float = Field(
        0.017483127170473314,
        gt=0,
        allow_inf_nan=False,
        description="step size of the optimizer, its peak in a schedule",
    )
    batch_size: int = Field(128, ge=2, le=1_000_000, description="images per step; at least 2, which batch norm needs")
    epochs: int = Field(70, ge=1, le=1_000_000, description="passes over the training images")
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="sgd, or adamw, which learns sooner from random weights"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False, description="pull of the weights towards zero")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of a block as a share of the next one's, towards the stem"
    )
    schedule: Literal["constant", "one-cycle", "cosine"] = Field(
        "constant",
        description="learning rate over the run: constant, one-cycle (up over the first tenth, then down), or cosine",
    )
    warmup_epochs: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="epochs over which the learning rate rises in a line"
    )
    unfreeze_at: int | None = Field(
        None, ge=2, description="epoch from which every block is trained, at unfreeze_rate; or none; default: none"
    )
    unfreeze_rate: float = Field(
        0.1, gt=0, le=1, description="peak learning rate after unfreeze_at, as a share of learning_rate"
    )
    augment: Literal["none", "flip", "flip-crop", "rand"] = Field(
        "flip",
        description="random changes to training images: flip left-right; flip-crop: also shifts by up to an eighth; "
        "rand: both and RandAugment",
    )
    mixup: float = Field(0.0, ge=0, le=10, description="alpha of mixup, which blends pairs of images; 0: off")
    cutmix: float = Field(0.0, ge=0, le=10, description="alpha of cutmix, which patches pairs of images; 0: off")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of each label spread over all classes")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is what is kept; 0: off"
    )
    clip_norm: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="largest norm of all gradients together; 0: no limit"
    )
    early_stopping: int = Field(
        0,
        ge=0,
        description="stop after this many epochs without a better validation accuracy and keep the best epoch's "
        "weights; 0: never, keep the last",
    )
    feature_cache: Literal["off", "on", "auto"] = Field(
        "auto",
        description="compute what the frozen blocks make of the images once and train from that; auto: where the "
        "settings allow it",
    )
    cache_folder: Path = Field(
        Path("artifacts/features"), description="folder of the feature caches, which all runs share"
    )
    cache_crops: int = Field(
        0, ge=0, le=64, description="random crops of each image to cache with augment flip-crop; 0: new ones each epoch"
    )
    side: int = Field(32, ge=8, le=1024, description="input side in pixels: smaller is faster, larger sees more")
    hidden_units: int = Field(
        512, ge=1, le=MAX_HIDDEN_UNITS, description="width of the additional fully connected layer"
    )
    precision: Literal["fp32", "bf16", "auto"] = Field(
        "fp32", description="arithmetic of training steps; auto: bf16 where the hardware has it; results are fp32"
    )
    compile: bool = Field(
        False, description="compile the network (torch.compile): on processors a minute more, then little faster"
    )
    deterministic: bool = Field(
        False, description="bitwise the same results in each run on a GPU too, where that is slower"
    )
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="of the initial head, the order of images, augmentation and split"
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of each class to validate on, where the data is not split yet"
    )
    broken_files: BrokenFiles = Field("refuse", description="image files that cannot be decoded: refuse or skip")
    run_folder: Path | None = Field(
        None, description="folder for metrics, report and what else tells of the run; default: OUTPUT-run"
    )
    checkpoints: Path | None = Field(
        None, description="folder of checkpoints; one in it is resumed; default: RUN_FOLDER/checkpoints"
    )
    checkpoint_every_s: float = Field(
        60.0, ge=0, allow_inf_nan=False, description="seconds between checkpoints, which are written at an epoch's end"
    )
    report: bool = Field(True, description="write report.html, evaluation.json and pictures into the run's folder")
    quantize: Quantize = Field(
        "auto",
        description="add an int8 network to the artifact, the fastest on processors, measured against float32; auto: "
        "if nncf is installed, and a failure is a warning; on: it is an error, after the float32 network is written",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="auto: cuda where there is a GPU, else cpu"
    )
    loader_workers: int | None = Field(
        None, ge=0, description="processes that decode when the images do not fit into memory; default: one per core"
    )
    model_name: str = Field(
        "resnet34", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="the name that answers carry"
    )

    @field_validator("freeze", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return () if value == "none" else tuple(part.strip() for part in value.split(","))
        return value

    @field_validator("unfreeze_at", mode="before")
    @classmethod
    def _none_is_never(cls, value: object) -> object:
        return None if value == "none" else value

    @property
    def frozen(self) -> tuple[Block, ...]:
        """The blocks that are not trained: as asked for, else as the reference where there is something to keep."""
        if self.freeze is not None:
            return self.freeze
        return () if self.weights == "none" else REFERENCE_FROZEN

    @property
    def folder(self) -> Path:
        """The run's folder: as asked for, else beside the artifact."""
        return self.run_folder or beside(self.output, "-run")

    @property
    def own_checkpoint_folder(self) -> Path:
        """Where checkpoints lie unless another place is named."""
        return self.folder / "checkpoints"

    @property
    def checkpoint_folder(self) -> Path:
        """Where checkpoints lie."""
        return self.checkpoints or self.own_checkpoint_folder

    def plain_reason(self) -> str | None:
        """Why these settings cannot train from cached features; None if they can."""
        if "stem" not in self.frozen:
            return "the stem is trained"
        if self.mixup or self.cutmix:
            return "mixup and cutmix blend images"
        if self.augment == "rand":
            return "RandAugment changes images anew each epoch"
        if self.augment == "flip-crop" and not self.cache_crops:
            return "crops are drawn anew each epoch (--cache-crops N caches N of them)"
        return None

    @model_validator(mode="after")
    def _cache_is_possible(self) -> Self:
        reason = self.plain_reason()
        if self.feature_cache == "on" and reason:
            raise ValueError(f"--feature-cache on is not possible: {reason}; --feature-cache auto trains without it")
        return self

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        frozen = min((self.unfreeze_at or self.epochs + 1) - 1, self.epochs)
        shortest = min(length for length in (frozen, self.epochs - frozen) if length)
        if self.warmup_epochs and self.warmup_epochs >= shortest:
            raise ValueError(
                f"--warmup-epochs {self.warmup_epochs:g} must be below the {shortest} epochs it is the beginning of"
            )
        return self

    @classmethod
    def resolve(cls, values: Mapping[str, object]) -> Self:
        """The settings of `merged`. Raises: ConfigError."""
        return cls.create(merged(values))


def beside(place: Path, suffix: str) -> Path:
    """`artifacts/pets` -> `artifacts/pets-run`. Raises: ConfigError for the root, which has nothing beside it."""
    named = place if place.name not in ("", "..") else place.resolve()
    if not named.name:
        raise ConfigError(f"{place} is no folder for a model; name one below it.")
    return named.with_name(f"{named.name}{suffix}")


def merged(values: Mapping[str, object]) -> dict[str, object]:
    """Recipe < tuning's best < `values`, which name both files. Raises: ConfigError."""
    given = dict(values)
    recipe, tuned = given.pop("recipe", None), given.pop("from_tuning", None)
    below = read_recipe(str(recipe)) if recipe else {}
    if tuned:
        from training.tuning.best import read_best

        below |= read_best(Path(str(tuned)))
    return {**below, **given}


def read_recipe(name: str) -> dict[str, object]:
    """The settings of a recipe: one of ours by name, or a TOML file. Raises: ConfigError."""
    ours = sorted(path.stem for path in RECIPES.glob("*.toml"))
    path = RECIPES / f"{name}.toml" if name in ours else Path(name)
    try:
        return tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(
            f"--recipe {name}: there is no such recipe ({', '.join(ours)}) and no such file ({exc.strerror})."
        ) from exc
    except (ValueError, RecursionError) as exc:  # of tomllib, of the text, of a name that no file can have
        raise ConfigError(f"--recipe {name} is not TOML: {exc}.") from exc
