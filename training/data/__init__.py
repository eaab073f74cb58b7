"""Where images come from: CIFAR-100 (`cifar100`), class folders (`folder`), a generated sample (`sample`)."""
