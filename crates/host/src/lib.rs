//! The Whimbrel daemon: wires engine, volumes, NBD, QEMU and peers together
