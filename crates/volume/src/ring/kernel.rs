//! The ring itself: the only place where memory is handed to the kernel.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use bytes::Bytes;
use io_uring::{IoUring, opcode, types};

use crate::buffers::Buffer;

/// Requests with the kernel at most, and those gathered to be handed over.
pub(super) const DEPTH: usize = 128;

/// What is to be done, with all that the kernel needs to find in place until it is done.
pub(super) struct Op<T> {
    pub file: Arc<File>,
    pub offset: u64,
    pub content: Content,
    /// Comes back with the result.
    pub tag: T,
}

pub(super) enum Content {
    /// To be read, from its byte `from` on.
    Into { buffer: Buffer, from: usize },
    /// To be written.
    From(Bytes),
}

pub(super) struct Kernel<T> {
    ring: IoUring,
    /// Requests by the number the kernel knows them by.
    slots: Vec<Option<Op<T>>>,
    free: Vec<usize>,
    /// Not yet handed over.
    gathered: VecDeque<usize>,
}

impl<T> Kernel<T> {
    /// Fails where the system has no io_uring, or refuses it.
    pub fn new() -> io::Result<Kernel<T>> {
        let mut builder = IoUring::builder();
        builder.setup_clamp();
        // One thread submits and collects. Kernels before 6.0 know neither flag; there it goes without.
        let plain = builder.clone();
        builder.setup_single_issuer().setup_coop_taskrun();
        let ring = builder
            .build(DEPTH as u32)
            .or_else(|_| plain.build(DEPTH as u32))?;
        Ok(Kernel {
            ring,
            slots: (0..DEPTH).map(|_| None).collect(),
            free: (0..DEPTH).rev().collect(),
            gathered: VecDeque::with_capacity(DEPTH),
        })
    }

    /// Readable when something has completed.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.ring.as_fd().try_clone_to_owned()
    }

    /// Requests gathered and with the kernel.
    pub fn busy(&self) -> usize {
        DEPTH - self.free.len()
    }

    /// Gathers a request; gives it back if there is no place left.
    pub fn gather(&mut self, op: Op<T>) -> Result<(), Op<T>> {
        let Some(slot) = self.free.pop() else {
            return Err(op);
        };
        self.slots[slot] = Some(op);
        self.gathered.push_back(slot);
        Ok(())
    }

    /// Hands over what has been gathered. An error leaves what the kernel did not take for the next time.
    pub fn submit(&mut self) -> io::Result<()> {
        while let Some(&slot) = self.gathered.front() {
            let op = self.slots[slot].as_mut().expect("gathered, so occupied");
            let fd = types::Fd(op.file.as_raw_fd());
            let entry = match &mut op.content {
                Content::Into { buffer, from } => {
                    let room = &mut buffer.as_mut()[*from..];
                    opcode::Read::new(fd, room.as_mut_ptr(), room.len() as u32)
                        .offset(op.offset)
                        .build()
                }
                Content::From(bytes) => opcode::Write::new(fd, bytes.as_ptr(), bytes.len() as u32)
                    .offset(op.offset)
                    .build(),
            };
            // SAFETY: file, buffer and bytes are owned by the slot, and their memory does not move with
            // it. The slot is emptied only when the request's completion is collected, and dropping the
            // ring waits for all of them. Nobody else reads or writes the buffer until then.
            let pushed = unsafe { self.ring.submission().push(&entry.user_data(slot as u64)) };
            if pushed.is_err() {
                // Full of what has not been handed over.
                self.ring.submit()?;
                continue;
            }
            self.gathered.pop_front();
        }
        if !self.ring.submission().is_empty() {
            self.ring.submit()?;
        }
        Ok(())
    }

    /// Hands over those that have completed, with the bytes done.
    pub fn collect(&mut self, mut done: impl FnMut(Op<T>, io::Result<usize>)) {
        for entry in self.ring.completion() {
            let slot = entry.user_data() as usize;
            let Some(op) = self.slots.get_mut(slot).and_then(Option::take) else {
                continue;
            };
            self.free.push(slot);
            let result = entry.result();
            done(
                op,
                match usize::try_from(result) {
                    Ok(bytes) => Ok(bytes),
                    Err(_) => Err(io::Error::from_raw_os_error(-result)),
                },
            );
        }
    }
}

impl<T> Drop for Kernel<T> {
    fn drop(&mut self) {
        // What the kernel never saw needs no waiting for.
        for slot in self.gathered.drain(..) {
            self.slots[slot] = None;
            self.free.push(slot);
        }
        while self.busy() > 0 {
            let waited = self.ring.submit_and_wait(1);
            self.collect(|_, _| {});
            if let Err(error) = waited
                && error.kind() != io::ErrorKind::Interrupted
            {
                // The kernel may still write there: better lost than used for something else.
                for op in self.slots.iter_mut().filter_map(Option::take) {
                    std::mem::forget(op);
                }
                return;
            }
        }
    }
}
