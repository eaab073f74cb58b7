"""Superclasses: which classes belong together, where that is known; the report orders and sums by them."""

from collections.abc import Sequence

from training.data import sample

CIFAR100 = {
    # The 20 superclasses of five classes each at https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky 2009,
    # "Learning Multiple Layers of Features from Tiny Images"), under the names of the file `meta`.
    "aquatic_mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food_containers": "bottle bowl can cup plate",
    "fruit_and_vegetables": "apple mushroom orange pear sweet_pepper",
    "household_electrical_devices": "clock keyboard lamp telephone television",
    "household_furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large_carnivores": "bear leopard lion tiger wolf",
    "large_man-made_outdoor_things": "bridge castle house road skyscraper",
    "large_natural_outdoor_scenes": "cloud forest mountain plain sea",
    "large_omnivores_and_herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium_mammals": "fox porcupine possum raccoon skunk",
    "non-insect_invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small_mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles_1": "bicycle bus motorcycle pickup_truck train",
    "vehicles_2": "lawn_mower rocket streetcar tank tractor",
}

_OF_CIFAR100 = {name: superclass for superclass, names in CIFAR100.items() for name in names.split()}


def superclasses(classes: Sequence[str]) -> tuple[str, ...] | None:
    """The superclass of each of `classes`, or None where they are not those of CIFAR-100 or of the sample."""
    if set(classes) == set(_OF_CIFAR100):
        return tuple(_OF_CIFAR100[name] for name in classes)
    if set(classes) == set(sample.CLASSES):
        return tuple(_of_sample(name) for name in classes)
    return None


def _of_sample(name: str) -> str:
    surface, shape = name.rsplit(" ", 1)
    return f"{'warm' if surface in sample.WARM else 'cool'} {shape}"
