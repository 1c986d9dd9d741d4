//! Peers: host identity, TLS with pinned keys, connection classes, pacing
