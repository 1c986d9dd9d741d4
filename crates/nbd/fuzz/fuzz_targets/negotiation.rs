#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../checks/negotiation.rs"]
mod check;

fuzz_target!(|bytes: &[u8]| check::check(bytes));
