//! The Whimbrel daemon: wires engine, volumes, NBD, QEMU and peers together

pub mod api;
pub mod config;
pub mod state;
