//! What the guest did at its source when it was stopped for the switch: QEMU tells it among the devices' state.
//!
//! Why it matters: a destination told to RUN a post-copy runs the guest, whatever that did before (QEMU 7.2 to 10),
//! and one that an operator had stopped would run on behind his back.
//!
//! The section is `globalstate` (migration/global_state of QEMU's documentation of device sections): `0x04`, u32
//! id, u8 length and name, u32 instance, u32 version, u32 size, then 100 bytes of which the first, up to a zero, are
//! the word that `query-status` had. It is looked for and not parsed towards, as no section before it says how long
//! it is; it stands before every device's, so nothing that a guest can write comes first.

/// `globalstate` with its length before it.
const NAME: &[u8] = b"\x0bglobalstate";
/// Instance, version and size, before the word.
const BEFORE: usize = 12;
/// Bytes kept for the word.
const WORD: usize = 100;

/// Words of a guest that stands still because somebody wants it to.
const STANDS: [&[u8]; 3] = [b"paused", b"prelaunch", b"postmigrate"];

/// Whether an operator had stopped the guest: then it is to stand still at its destination too. One that a disk's
/// error stopped makes its request again there.
pub fn was_stopped(device_state: &[u8]) -> bool {
    word(device_state).is_some_and(|word| STANDS.contains(&word))
}

/// Whether a disk's error had stopped it.
pub fn was_stopped_by_disk(device_state: &[u8]) -> bool {
    word(device_state) == Some(b"io-error")
}

fn word(state: &[u8]) -> Option<&[u8]> {
    let at = state.windows(NAME.len()).position(|bytes| bytes == NAME)?;
    let word = state.get(at + NAME.len() + BEFORE..)?;
    let word = &word[..word.len().min(WORD)];
    word.split(|&byte| byte == 0).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(word: &str) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, 3];
        bytes.extend(NAME);
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend((word.len() as u32 + 1).to_be_bytes());
        bytes.extend(word.as_bytes());
        bytes.resize(bytes.len() + WORD - word.len(), 0);
        bytes.extend([0x7e, 0, 0, 0, 3]);
        bytes
    }

    #[test]
    fn only_one_that_was_stopped_stands_still() {
        assert!(was_stopped(&state("paused")));
        for word in ["running", "io-error", "suspended", ""] {
            assert!(!was_stopped(&state(word)), "{word}");
            assert_eq!(was_stopped_by_disk(&state(word)), word == "io-error");
        }
    }

    #[test]
    fn a_state_that_says_nothing_or_ends_early_is_of_one_that_ran() {
        assert!(!was_stopped(b""));
        assert!(!was_stopped(NAME));
        let whole = state("paused");
        for len in 0..NAME.len() + 5 + BEFORE {
            assert!(!was_stopped(&whole[..len]));
        }
    }
}
