//! QEMU: QMP, the migration stream read and written, RAM source and RAM sink
