//! Volumes: backends and the residency journal
