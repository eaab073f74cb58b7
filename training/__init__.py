"""Images and classes in, artifact out: fine-tuning (see ARCHITECTURE.md)."""

import sys
from importlib.util import find_spec

from service.model.interrupts import end_on_signals

end_on_signals()

# While `python -m training.X` looks for X, the first argument is "-m" (Python's documentation of sys.argv).
if sys.argv[:1] == ["-m"] and not all(find_spec(name) for name in ("pydantic", "torch")):
    sys.exit(
        "This Python lacks packages that training needs: run `make setup` (for training.launch `make "
        "setup-sagemaker`), then use .venv/bin/python."
    )
