//! The laboratory, not shipped: hosts as network namespaces, WAN emulator, guest builder, workloads
