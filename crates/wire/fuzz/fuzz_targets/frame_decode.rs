//! Whatever arrives, in whatever pieces: frames come out, or an error, and what came out as a frame
//! is encoded to the bytes it came from.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use whimbrel_wire::frame::{Decoder, FrameError, encode};

fuzz_target!(|input: (u16, bool, &[u8])| {
    let (piece, mend, stream) = input;
    let mut stream = stream.to_vec();
    if mend {
        mend_checksums(&mut stream);
    }
    let piece = usize::from(piece).max(1);
    let (mut decoder, mut buf, mut back) = (Decoder::default(), BytesMut::new(), BytesMut::new());
    for bytes in stream.chunks(piece) {
        buf.extend_from_slice(bytes);
        loop {
            match decoder.decode(&mut buf) {
                Ok(Some(frame)) => {
                    encode(frame.kind, frame.flags, &frame.payload, &mut back)
                        .expect("what was decoded can be encoded");
                }
                Ok(None) => {
                    assert!(decoder.wants(&buf) > 0);
                    break;
                }
                Err(error) => {
                    assert_eq!(decoder.decode(&mut buf), Err(error));
                    assert_eq!(back[..], stream[..back.len()]);
                    return;
                }
            }
        }
    }
    assert_eq!(back[..], stream[..back.len()]);
});

/// Gives each frame the checksum it should have, which no fuzzer finds by trying.
fn mend_checksums(stream: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = stream.get(at..at + 16) {
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        let Some(end) = at.checked_add(16 + len).filter(|&end| end <= stream.len()) else {
            return;
        };
        let mut one = BytesMut::from(&stream[at..end]);
        if let Err(FrameError::Checksum { computed, .. }) = Decoder::default().decode(&mut one) {
            stream[at + 8..at + 16].copy_from_slice(&computed.to_le_bytes());
        }
        at = end;
    }
}
