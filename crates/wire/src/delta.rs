//! What turns one unit's content into another: the bytes that changed, and where they lie.
//!
//! A guest that writes to a page mostly changes little of it: a counter, a few words of a list. What it changed is
//! said as runs, one after the other to the end of the page:
//!
//! ```text
//! run:    number: bytes that are as they were | number: bytes that changed, not 0 | the changed bytes, as they are now
//! number: below 128 one byte; else two, the lower seven bits first, with the high bit of the first byte set
//! ```
//!
//! What follows the last run is as it was, so content that did not change at all is no bytes. A few bytes that
//! did not change are said among those that did, where a run of their own would be as long.
//!
//! Traps: the one who patches has only the delta's word for lengths, so each is checked against the page before
//! anything is written. A delta says nothing of what it was made from; whoever applies it must have the very same
//! content, and checks the result by other means (see [`kept`](crate::kept)).

use whimbrel_engine::space::UNIT;

/// Bytes of a unit.
pub const PAGE: usize = UNIT as usize;

/// A unit's content.
pub type Page = [u8; PAGE];

/// So many equal bytes end a run of changed ones: the numbers of the next take two bytes at least.
const GAP: usize = 3;

/// Bytes that are no delta of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatchError {
    #[error("a delta ends inside a run")]
    Short,
    #[error("a delta has a run without bytes")]
    Empty,
    #[error("a delta reaches byte {end} of a page of {PAGE}")]
    Beyond { end: usize },
}

/// Appends what turns `old` into `new`, if that takes no more than `most` bytes; else `out` stays as it was.
pub fn diff(old: &Page, new: &Page, most: usize, out: &mut Vec<u8>) -> bool {
    let begin = out.len();
    let mut said = 0;
    while let Some(start) = first_difference(old, new, said) {
        // Looking further than what may be said at all would be in vain.
        let limit = PAGE.min(start + most + 1);
        let end = end_of_run(old, new, start, limit);
        put(out, start - said);
        put(out, end - start);
        out.extend_from_slice(&new[start..end]);
        said = end;
        if out.len() - begin > most {
            out.truncate(begin);
            return false;
        }
    }
    true
}

/// Turns the page that the delta was made from into the other. After an error the page is neither.
pub fn patch(page: &mut Page, mut delta: &[u8]) -> Result<(), PatchError> {
    let mut at = 0;
    while !delta.is_empty() {
        let start = at + take(&mut delta)?;
        let len = take(&mut delta)?;
        if len == 0 {
            return Err(PatchError::Empty);
        }
        let end = start + len;
        let run = page.get_mut(start..end).ok_or(PatchError::Beyond { end })?;
        let (changed, rest) = delta.split_at_checked(len).ok_or(PatchError::Short)?;
        run.copy_from_slice(changed);
        (delta, at) = (rest, end);
    }
    Ok(())
}

fn first_difference(old: &Page, new: &Page, from: usize) -> Option<usize> {
    let mut at = from;
    while at < PAGE {
        match (old[at..].first_chunk::<8>(), new[at..].first_chunk::<8>()) {
            (Some(a), Some(b)) => {
                let differ = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
                if differ != 0 {
                    return Some(at + differ.trailing_zeros() as usize / 8);
                }
                at += 8;
            }
            _ if old[at] != new[at] => return Some(at),
            _ => at += 1,
        }
    }
    None
}

/// Where the changed bytes from `start` on end: before the next [`GAP`] equal ones, or at the limit.
fn end_of_run(old: &Page, new: &Page, start: usize, limit: usize) -> usize {
    let mut end = start;
    for at in start..limit {
        if old[at] != new[at] {
            end = at + 1;
        } else if at + 1 - end >= GAP {
            break;
        }
    }
    end
}

/// Numbers are at most [`PAGE`].
fn put(out: &mut Vec<u8>, number: usize) {
    if number < 0x80 {
        out.push(number as u8);
    } else {
        out.push(number as u8 | 0x80);
        out.push((number >> 7) as u8);
    }
}

/// At most 32,767.
fn take(delta: &mut &[u8]) -> Result<usize, PatchError> {
    let (&low, rest) = delta.split_first().ok_or(PatchError::Short)?;
    *delta = rest;
    if low < 0x80 {
        return Ok(usize::from(low));
    }
    let (&high, rest) = delta.split_first().ok_or(PatchError::Short)?;
    *delta = rest;
    Ok(usize::from(low & 0x7f) | usize::from(high) << 7)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    fn delta(old: &Page, new: &Page) -> Vec<u8> {
        let mut out = Vec::new();
        assert!(diff(old, new, 2 * PAGE, &mut out));
        out
    }

    /// The bytes of the format, for ever.
    #[test]
    fn a_delta_has_its_golden_bytes() {
        let old = [7; PAGE];
        let mut new = old;
        assert_eq!(delta(&old, &new), [0_u8; 0]);
        new[0] = 1;
        new[300] = 2;
        new[302] = 3;
        new[PAGE - 1] = 4;
        let golden = [0, 1, 1, 0xab, 2, 3, 2, 7, 3, 0xd0, 29, 1, 4];
        assert_eq!(delta(&old, &new), golden);
        let mut patched = old;
        assert_eq!(patch(&mut patched, &golden), Ok(()));
        assert!(patched == new);
    }

    #[test]
    fn a_page_of_which_all_changed_is_refused_and_leaves_nothing_behind() {
        let mut out = vec![9];
        assert!(!diff(&[0; PAGE], &[1; PAGE], PAGE / 4, &mut out));
        assert_eq!(out, [9]);
        assert_eq!(delta(&[0; PAGE], &[1; PAGE]).len(), PAGE + 3);
    }

    #[test]
    fn deltas_that_do_not_fit_a_page_are_refused() {
        for (delta, error) in [
            (&[0x80][..], PatchError::Short),
            (&[3], PatchError::Short),
            (&[0, 2, 1], PatchError::Short),
            (&[0, 0], PatchError::Empty),
            (&[0xff, 31, 2, 1, 1], PatchError::Beyond { end: PAGE + 1 }),
            (
                &[0xff, 0xff, 0xff, 0xff],
                PatchError::Beyond { end: 2 * 32_767 },
            ),
        ] {
            assert_eq!(patch(&mut [0; PAGE], delta), Err(error), "{delta:?}");
        }
    }

    /// A page, and what a guest makes of it.
    pub(crate) fn pages() -> impl Strategy<Value = (Box<Page>, Box<Page>)> {
        let change = (0..PAGE, 1..400_usize, any::<u8>(), 1..9_usize);
        let changes = prop::collection::vec(change, 0..40);
        (any::<u64>(), changes).prop_map(|(seed, changes)| {
            let mut old = Box::new([0; PAGE]);
            for (n, byte) in old.iter_mut().enumerate() {
                *byte = (seed >> (n % 57)) as u8 ^ (n / 64) as u8;
            }
            let mut new = old.clone();
            for (at, len, byte, step) in changes {
                let run = &mut new[at..PAGE.min(at + len)];
                run.iter_mut().step_by(step).for_each(|b| *b ^= byte);
            }
            (old, new)
        })
    }

    proptest! {
        #[test]
        fn a_page_comes_back_and_no_delta_is_longer_than_it_may((old, new) in pages(), most in 0..2 * PAGE) {
            let mut out = Vec::new();
            let whole = delta(&old, &new);
            prop_assert!(whole.len() <= PAGE + 3);
            prop_assert_eq!(diff(&old, &new, most, &mut out), whole.len() <= most);
            prop_assert!(out.len() <= most);
            let mut page = old.clone();
            prop_assert_eq!(patch(&mut page, &whole), Ok(()));
            prop_assert!(page == new);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = patch(&mut [0; PAGE], &bytes);
        }
    }
}
