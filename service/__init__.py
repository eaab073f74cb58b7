"""Image bytes in, class probabilities out: the HTTP service (see ARCHITECTURE.md)."""

from service.model.interrupts import end_on_signals

end_on_signals()
