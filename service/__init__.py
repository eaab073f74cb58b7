"""Image bytes in, class probabilities out: the HTTP service (see ARCHITECTURE.md)."""

from service.model.interrupts import quit_on_ctrl_c

quit_on_ctrl_c()
