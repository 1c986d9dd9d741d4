//! What frames promise whatever the content, and however a stream is cut.

use bytes::BytesMut;
use proptest::prelude::*;
use whimbrel_wire::frame::{Decoder, Frame, FrameError, HEADER_LEN, Kind, encode, header};

fn frames() -> impl Strategy<Value = Vec<(Kind, u16, Vec<u8>)>> {
    let frame = prop_oneof![
        (
            prop_oneof![Just(Kind::Hello), Just(Kind::Control), Just(Kind::Units)],
            any::<u16>(),
            prop::collection::vec(any::<u8>(), 0..3000)
        ),
        (
            prop_oneof![Just(Kind::Ping), Just(Kind::Pong)],
            any::<u16>(),
            prop::collection::vec(any::<u8>(), 8..=8)
        ),
    ];
    prop::collection::vec(frame, 1..8)
}

fn encoded(frames: &[(Kind, u16, Vec<u8>)]) -> BytesMut {
    let mut out = BytesMut::new();
    for (kind, flags, payload) in frames {
        encode(*kind, *flags, payload, &mut out).unwrap();
    }
    out
}

fn decode_all(stream: &[u8], cuts: &[usize]) -> Result<(Vec<Frame>, bool), FrameError> {
    let mut decoder = Decoder::default();
    let (mut buf, mut frames, mut rest) = (BytesMut::new(), Vec::new(), stream);
    let mut cuts = cuts.iter().cycle();
    while !rest.is_empty() {
        let n = (*cuts.next().expect("at least one")).min(rest.len());
        buf.extend_from_slice(&rest[..n]);
        rest = &rest[n..];
        while let Some(frame) = decoder.decode(&mut buf)? {
            frames.push(frame);
        }
        assert!(decoder.wants(&buf) > 0);
    }
    Ok((frames, decoder.is_between_frames(&buf)))
}

proptest! {
    #[test]
    fn frames_come_out_as_they_went_in_however_the_stream_is_cut(
        frames in frames(),
        cuts in prop::collection::vec(1_usize..500, 1..20),
    ) {
        let (decoded, between) = decode_all(&encoded(&frames), &cuts).unwrap();
        prop_assert!(between);
        let decoded: Vec<_> = decoded.into_iter().map(|f| (f.kind, f.flags, f.payload.to_vec())).collect();
        prop_assert_eq!(decoded, frames);
    }

    #[test]
    fn a_stream_cut_short_gives_its_whole_frames_and_says_that_it_is_torn(frames in frames(), keep: prop::sample::Index) {
        let stream = encoded(&frames);
        let keep = keep.index(stream.len());
        let (decoded, between) = decode_all(&stream[..keep], &[100]).unwrap();
        let mut end = 0;
        let ends: Vec<usize> = frames.iter().map(|f| { end += HEADER_LEN + f.2.len(); end }).collect();
        prop_assert_eq!(decoded.len(), ends.iter().filter(|&&end| end <= keep).count());
        prop_assert_eq!(between, keep == 0 || ends.contains(&keep));
    }

    #[test]
    fn no_flipped_bit_passes_for_what_was_sent(frames in frames(), at: prop::sample::Index, bit in 0..8) {
        let sent = encoded(&frames);
        let mut stream = sent.clone();
        let at = at.index(stream.len());
        stream[at] ^= 1_u8 << bit;
        let (whole, _) = decode_all(&sent, &[1 << 20]).unwrap();
        // Damage is an error, or the end of what can be read: never another content.
        if let Ok((decoded, between)) = decode_all(&stream, &[1 << 20]) {
            prop_assert!(!between);
            prop_assert!(whole.starts_with(&decoded) && decoded.len() < whole.len());
        }
    }

    #[test]
    fn the_header_does_not_depend_on_how_the_payload_is_parted(payload: Vec<u8>, at: prop::sample::Index, flags: u16) {
        let at = at.index(payload.len() + 1);
        let (head, body) = payload.split_at(at);
        prop_assert_eq!(header(Kind::Units, flags, &[head, body]), header(Kind::Units, flags, &[&payload]));
    }

    #[test]
    fn any_bytes_are_frames_or_an_error_that_stays(stream: Vec<u8>, tail: Vec<u8>) {
        let mut decoder = Decoder::default();
        let mut buf = BytesMut::from(&stream[..]);
        let ended = loop {
            match decoder.decode(&mut buf) {
                Ok(Some(_)) => {}
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = ended {
            buf.extend_from_slice(&tail);
            prop_assert_eq!(decoder.decode(&mut buf), Err(error));
        }
    }
}
