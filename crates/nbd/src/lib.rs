//! The NBD server: protocol, negotiation, one validate step, trusted handlers
