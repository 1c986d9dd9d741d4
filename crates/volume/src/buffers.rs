//! Buffers for disk content: aligned to 4 KiB, as `O_DIRECT` wants them, and used again.
//!
//! Fresh memory is zeroed by the kernel page by page as it is touched, and large pieces go back to the
//! kernel when they are freed: for a read of 256 KiB from the page cache that cost as much as the read.
//!
//! Bounds: a buffer is held by its request, and requests are bounded by their connections. Of those that
//! nobody holds, at most [`KEPT`] bytes are kept; past it they are freed.
//!
//! A buffer comes with whatever its last holder left in it. Nothing of that may leave: [`Buffer::freeze`]
//! is for those that were filled to the end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;

/// Every buffer begins at a multiple of this.
pub(crate) const ALIGN: usize = 4096;

/// Most bytes kept that nobody holds.
pub(crate) const KEPT: usize = 16 << 20;

/// Capacities kept: 4 KiB times a power of two, up to 1 MiB. Larger buffers are made and freed.
const CLASSES: usize = 9;

#[derive(Clone, Default)]
pub(crate) struct Buffers(Arc<Shelves>);

#[derive(Default)]
struct Shelves {
    free: [Mutex<Vec<Block>>; CLASSES],
    kept: AtomicUsize,
}

/// Memory with room for an aligned part.
struct Block {
    bytes: Vec<u8>,
    start: usize,
}

impl Block {
    fn new(capacity: usize) -> Block {
        let bytes = vec![0; capacity + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Block { bytes, start }
    }
}

/// `len` bytes, aligned.
pub(crate) struct Buffer {
    /// `None` only while it is dropped.
    block: Option<Block>,
    len: usize,
    home: Arc<Shelves>,
}

impl Buffers {
    /// A buffer of `len` bytes, of any content.
    pub fn take(&self, len: usize) -> Buffer {
        let class = class(len);
        let kept = class.and_then(|class| {
            let block = self.0.shelf(class).pop()?;
            self.0.kept.fetch_sub(capacity(class), Ordering::Relaxed);
            Some(block)
        });
        let block = kept.unwrap_or_else(|| Block::new(class.map_or(len, capacity)));
        Buffer {
            block: Some(block),
            len,
            home: Arc::clone(&self.0),
        }
    }
}

fn class(len: usize) -> Option<usize> {
    let class = len.div_ceil(ALIGN).next_power_of_two().trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

fn capacity(class: usize) -> usize {
    ALIGN << class
}

impl Shelves {
    fn shelf(&self, class: usize) -> std::sync::MutexGuard<'_, Vec<Block>> {
        self.free[class]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    /// All of it, without a copy. It must have been filled.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        let block = self.block.as_ref().expect("present until it is dropped");
        &block.bytes[block.start..block.start + self.len]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        let block = self.block.as_mut().expect("present until it is dropped");
        &mut block.bytes[block.start..block.start + self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let (Some(block), Some(class)) = (self.block.take(), class(self.len)) else {
            return;
        };
        let size = capacity(class);
        if self.home.kept.fetch_add(size, Ordering::Relaxed) + size > KEPT {
            self.home.kept.fetch_sub(size, Ordering::Relaxed);
            return;
        }
        self.home.shelf(class).push(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_is_aligned_and_as_long_as_asked() {
        let buffers = Buffers::default();
        for len in [
            0,
            1,
            4095,
            4096,
            4097,
            65_536,
            1 << 20,
            (1 << 20) + 1,
            5 << 20,
        ] {
            let mut buffer = buffers.take(len);
            assert_eq!(buffer.as_mut().len(), len);
            assert_eq!(buffer.as_ref().as_ptr().align_offset(ALIGN), 0);
        }
    }

    #[test]
    fn what_is_given_back_is_used_again_and_what_is_kept_is_bounded() {
        let buffers = Buffers::default();
        let first = buffers.take(5000).freeze();
        let place = first.as_ptr();
        drop(first);
        assert_eq!(buffers.take(8192).as_ref().as_ptr(), place);
        let many: Vec<_> = (0..40).map(|_| buffers.take(1 << 20)).collect();
        drop(many);
        let kept = buffers.0.kept.load(Ordering::Relaxed);
        assert!(kept <= KEPT && kept > KEPT - (2 << 20), "{kept}");
        assert_eq!(buffers.0.shelf(8).len(), 15);
    }
}
