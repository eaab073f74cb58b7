"""Which classes belong together."""

from collections import Counter

from training.data import sample
from training.data.superclasses import CIFAR100, superclasses

CLASSES = tuple(sorted(name for names in CIFAR100.values() for name in names.split()))


def test_cifar_100_has_twenty_superclasses_of_five_classes() -> None:
    assert len(set(CLASSES)) == 100
    found = superclasses(CLASSES)
    assert found is not None
    assert set(Counter(found).values()) == {5} and len(set(found)) == 20
    # The first and the last of the file `meta`, whose classes are in alphabetical order.
    assert (CLASSES[0], found[0], CLASSES[-1], found[-1]) == (
        "apple", "fruit_and_vegetables", "worm", "non-insect_invertebrates",
    )  # fmt: skip


def test_the_sample_has_the_superclasses_it_was_drawn_with() -> None:
    found = superclasses(sample.CLASSES)
    assert found is not None
    assert set(found) == set(sample.SUPERCLASSES)
    assert dict(zip(sample.CLASSES, found, strict=True))["red plain star"] == "warm star"


def test_other_classes_have_none() -> None:
    assert superclasses(("cat", "dog")) is None
    assert superclasses(CLASSES[:99]) is None
