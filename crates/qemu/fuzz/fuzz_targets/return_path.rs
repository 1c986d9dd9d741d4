//! What a destination QEMU says, as arbitrary bytes; what is understood is said again the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use whimbrel_qemu::stream::return_path::ReturnMessage;

fuzz_target!(|bytes: &[u8]| {
    let mut rest = bytes;
    while let Ok(Some((message, used))) = ReturnMessage::decode(rest) {
        assert_eq!(message.encode(), &rest[..used]);
        rest = &rest[used..];
    }
});
