//! The fuzzers' stored seeds, replayed without a fuzzer.

use std::path::Path;

#[path = "../fuzz/checks/negotiation.rs"]
mod negotiation;
#[path = "../fuzz/checks/request.rs"]
mod request;

/// Runs a check on every seed of its own, and on every beginning of one.
fn replay(target: &str, check: fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let files: Vec<_> = std::fs::read_dir(seeds.join(target))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(files.len() >= 20, "{} seeds of {target}", files.len());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        println!("{}", file.display());
        for end in 0..=bytes.len() {
            check(&bytes[..end]);
        }
    }
}

#[test]
fn negotiations() {
    replay("negotiation", negotiation::check);
}

#[test]
fn requests() {
    replay("request", request::check);
}
