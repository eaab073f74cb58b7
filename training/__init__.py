"""Images and classes in, artifact out: fine-tuning (see ARCHITECTURE.md)."""

from service.model.interrupts import quit_on_ctrl_c

quit_on_ctrl_c()
